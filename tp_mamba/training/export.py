"""A run's checkpoint as a model that transformers, and every other verb, loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import COMPANIONS
from tp_mamba.config import MambaConfig
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.quoting import shown_path
from tp_mamba.training.data_parallel import masters_of
from tp_mamba.training.ranks import make_ranks
from tp_mamba.training.saver import read_run, read_tensors, step_folder, steps_in
from tp_mamba.training.state import copy_in, room_for

TOKENIZER = "tokenizer"
"""The folder in that of a run with the files of its tokenizer."""


def find_step(run: Path, wanted: int | str) -> int:
    """The step that ``wanted`` names: itself, ``"last"``, or ``"best"``, by validation, else the last.

    Raises:
        CheckpointError: ``run`` holds no such checkpoint.
    """
    steps = steps_in(run)
    if not steps:
        raise CheckpointError(
            f"{shown_path(run)} holds no checkpoint of a training run: name a folder that tp-mamba train has written"
        )
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = read_run(step_folder(run, steps[-1]))["best"][0]
        return best if best in steps else steps[-1]
    if wanted not in steps:
        raise CheckpointError(
            f"{shown_path(run)} holds no checkpoint of step {wanted}: it has {', '.join(map(str, steps))}"
        )
    return int(wanted)


def export_run(
    run: Path, out: Path, *, step: int | str = "best", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Write the model of a run to ``out`` in the layout of its family, with the run's tokenizer; in one process.

    Args:
        step: a number, ``"last"``, or ``"best"``.
        dtype: of the weights; A_log, D and dt biases stay float32.

    Returns:
        the step, and the validation loss if it is the best one.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or ``out`` is something else than a checkpoint.
        OSError: ``out`` cannot be written.
    """
    step = find_step(run, step)
    folder = step_folder(run, step)
    info = read_run(folder)
    ranks = make_ranks(TensorParallel(device="cpu"), 1)
    config = MambaConfig.from_dict(info["config"])
    model = MambaForCausalLM(config, ranks.tp, torch.float32, "meta", trainable=True).to_empty(device="cpu")
    masters = masters_of(model, ranks)
    described, rooms = room_for(masters, None, ranks)
    read_tensors(folder, described, ranks)
    copy_in(masters, None, rooms)
    model.to(dtype)
    if (run / TOKENIZER).is_dir():
        model.checkpoint_folder = run / TOKENIZER
    model.save_pretrained(out)
    best_step, best_loss, _ = info["best"]
    return {"step": step, "valid_loss": best_loss if best_step == step else None}


def keep_companions(source: Path, run: Path) -> None:
    """Copy the files of a tokenizer, and how to sample, from ``source`` into ``run``, for :func:`export_run`."""
    (run / TOKENIZER).mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, run / TOKENIZER / name)
