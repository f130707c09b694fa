"""A small model, documents of random tokens, and a trainer over whatever ranks there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tp_mamba.config import MambaConfig
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.training.ranks import Ranks, make_ranks
from tp_mamba.training.settings import TrainSettings
from tp_mamba.training.setup import build_model
from tp_mamba.training.tokens import Tokens
from tp_mamba.training.trainer import Trainer

# D = 22 and V = 29 divide neither by 3 nor by 4; H divides by 2 and 3, R by 3 alone.
CONFIG = MambaConfig.from_dict(
    {
        "model_type": "mamba",
        "hidden_size": 12,
        "intermediate_size": 22,
        "num_hidden_layers": 2,
        "state_size": 4,
        "conv_kernel": 4,
        "time_step_rank": 3,
        "vocab_size": 29,
    }
)

_RANKS: dict[int, Ranks] = {}


def ranks_of(tp: TensorParallel, n: int) -> Ranks:
    """The mesh of this process, made once: every one has process groups of its own."""
    if tp.size == 1:
        return make_ranks(tp, n)
    if n not in _RANKS:
        _RANKS[n] = make_ranks(tp, n)
    return _RANKS[n]


def documents(sizes: tuple[int, ...], seed: int = 0) -> Tokens:
    """Documents of ``sizes`` random tokens."""
    rng = np.random.default_rng(seed)
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    # Squared, so that there is something to learn: small ids are more frequent.
    return Tokens((rng.random(int(bounds[-1])) ** 2 * 29).astype(np.uint16), bounds)


def settings(**changes: Any) -> TrainSettings:
    """Six steps of six rows of eight tokens."""
    given = {"steps": 6, "batch_size": 6, "sequence_length": 8, "lr": 5e-3, "log_every": 1, "seed": 3}
    return TrainSettings(**{**given, **changes})


def trainer(
    tp: TensorParallel,
    run: Path,
    n: int = 1,
    *,
    sequence_parallel: bool = False,
    valid: Tokens | None = None,
    **changes: Any,
) -> Trainer:
    """A trainer of a new model over ``n`` tensor-parallel ranks and all there are of data ranks."""
    ranks, given = ranks_of(tp, n), settings(**changes)
    model = build_model(
        ranks,
        config=CONFIG,
        checkpoint=None,
        seed=given.seed,
        compute_dtype=torch.float32,
        sequence_parallel=sequence_parallel,
    )
    return Trainer(model, given, ranks, documents((3, 40, 9, 9, 100, 1, 70, 5)), valid, run)


def curve(of: Trainer) -> list[float]:
    """The losses of all steps that are left."""
    losses: list[float] = []
    of.fit(lambda step, steps, values: losses.append(values["loss"]))
    return losses
