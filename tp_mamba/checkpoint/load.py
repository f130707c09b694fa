"""Filling a model, or one mixer, from a checkpoint: each rank reads its own slices and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.matching import Entry, Matching, match, verify_tied
from tp_mamba.checkpoint.names import canonical_name
from tp_mamba.checkpoint.progress import Progress
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.checkpoint.sources.shards import local_shape
from tp_mamba.mixer import MambaMixer
from tp_mamba.models.base import CausalLM
from tp_mamba.parallel.sharding import ShardedTensor, sharded_tensors


def load_model(model: CausalLM, folder: str | Path, progress: Progress | None = None) -> None:
    """Fill every parameter of ``model`` from the checkpoint in ``folder``; every rank calls this.

    All names, shapes and dtypes are checked, from headers, before the first weight is read.

    Raises:
        CheckpointError: the checkpoint is damaged or is not this model's.
        RankFailedError: another rank failed.
    """
    with model.tp.agreed():
        load_rank(model, folder, progress)


def load_rank(model: CausalLM, folder: str | Path, progress: Progress | None = None) -> TensorSource:
    """:func:`load_model` for this rank alone, without a word to the others.

    Returns:
        what was read from, whose ``bytes_read`` says how much that was.
    """
    source = open_source(folder, rank=model.tp.rank, size=model.tp.size)
    _fill(sharded_tensors(model), source, None, progress)
    return source


def load_mixer(mixer: MambaMixer, folder: str | Path, prefix: str) -> None:
    """Fill one mixer from the tensors ``{prefix}.*`` of a checkpoint of any family; every rank calls this.

    Args:
        prefix: for example ``"backbone.layers.0.mixer"``, or ``"model.layers.0.mamba"`` in a Jamba checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, has nothing under ``prefix``, or has another mixer there.
        RankFailedError: another rank failed.
    """
    with mixer.tp.agreed():
        load_mixer_rank(mixer, folder, prefix)


def load_mixer_rank(mixer: MambaMixer, folder: str | Path, prefix: str) -> TensorSource:
    """:func:`load_mixer` for this rank alone, as :func:`load_rank`."""
    source = open_source(folder, rank=mixer.tp.rank, size=mixer.tp.size)
    root = f"{canonical_name(f'{prefix}.')}"
    names = [name for name in source.names() if canonical_name(name).startswith(root)]
    if not names:
        raise CheckpointError(
            f"{folder} holds no tensor under {prefix}: give the name of a Mamba layer's mixer"
        )
    _fill(sharded_tensors(mixer, root), source, names, None)
    return source


def _fill(
    tensors: Iterable[ShardedTensor],
    source: TensorSource,
    names: list[str] | None,
    progress: Progress | None,
) -> None:
    matching = match(tensors, source, names=names)
    tp = matching.entries[0].tensor.tp
    verify_tied(source, matching, tp.rank, tp.size)
    total, done = _bytes_of(source, matching), 0
    for entry in matching:
        # In the file's dtype until the parameter takes it: A, D and dt bias go to float32 directly.
        device = entry.tensor.param.device
        rows = [rows.to(device=device) for rows in entry.read_spans(source, tp.rank, tp.size)]
        entry.tensor.load(entry.shard.assemble(rows, tp.rank, tp.size), entry.dtype(source))
        done += _rank_bytes(source, entry)
        if progress is not None:
            progress("loading weights", done, total)


def _rank_bytes(source: TensorSource, entry: Entry) -> int:
    tp = entry.tensor.tp
    return prod(local_shape(entry.shard, tp.rank, tp.size)) * entry.dtype(source).itemsize


def _bytes_of(source: TensorSource, matching: Matching) -> int:
    return sum(_rank_bytes(source, entry) for entry in matching)
