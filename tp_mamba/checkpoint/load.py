"""Filling a model, or one mixer, from a checkpoint: each rank reads its own slices and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from tp_mamba.checkpoint.config import read_family
from tp_mamba.checkpoint.errors import CheckpointError, ConfigError
from tp_mamba.checkpoint.matching import BASE_GROUP, Entry, Matching, match, verify_tied
from tp_mamba.checkpoint.names import Naming, common_prefixes
from tp_mamba.checkpoint.progress import Progress
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.checkpoint.sources.shards import local_shape
from tp_mamba.mixer import MambaMixer
from tp_mamba.models.base import CausalLM
from tp_mamba.models.registry import Family, families, get_family
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors
from tp_mamba.quoting import shown, shown_path


def load_model(
    model: CausalLM,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    device: torch.device | str | None = None,
    group: str = BASE_GROUP,
) -> None:
    """Fill the parameters of ``model`` from the checkpoint in ``folder``; every rank calls this.

    All names, shapes and dtypes are checked, from headers, before the first weight is read.

    Args:
        progress: called as loading goes on.
        device: where the parameters of a model on the meta device get memory, once the checkpoint is known to be
            its own; not for other models.
        group: the tensors that the checkpoint has to hold (:attr:`tp_mamba.parallel.sharding.Shard.group`). Those
            of other groups are loaded, without one missing, where it holds any of them.

    Raises:
        CheckpointError: the checkpoint is damaged or is not this model's.
        RankFailedError: another rank failed.
    """
    with model.tp.agreed():
        load_rank(model, folder, progress, device=device, group=group)


def load_rank(
    model: CausalLM,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    device: torch.device | str | None = None,
    group: str = BASE_GROUP,
) -> TensorSource:
    """:func:`load_model` for this rank alone, without a word to the others.

    Returns:
        what was read from, whose ``bytes_read`` says how much that was.
    """
    tp = model.tp
    source = open_source(folder, rank=tp.rank, size=tp.size)
    matching = match(sharded_tensors(model), source, get_family(model.config.model_type), group=group)
    verify_tied(source, matching, tp.rank, tp.size)
    if device is not None:
        model.to_empty(device=device)
    _fill(matching, source, tp, progress)
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
    tp = mixer.tp
    source = open_source(folder, rank=tp.rank, size=tp.size)
    naming, root, names = _mixer_names(source, Path(folder), prefix)
    matching = match(sharded_tensors(mixer, root), source, naming.family, names=names, naming=naming)
    _fill(matching, source, tp, None)
    return source


def _mixer_names(source: TensorSource, folder: Path, prefix: str) -> tuple[Naming, str, list[str]]:
    """How to read the names of ``source``, the name of the mixer at ``prefix`` here, and its tensors there.

    A folder whose config.json does not say may be any family's: that of a model with other layers beside its mixers,
    which cannot be built here, is a place to take one mixer from all the same.
    """
    try:
        known: Sequence[Family] = [read_family(folder)]
    except ConfigError:
        known = families()
    for family in known:
        for in_front in common_prefixes(source.names()):
            naming = Naming(family, in_front, source.names_are_ours)
            root = family.our_name(f"{prefix}.".removeprefix(in_front))
            if names := [name for name in source.names() if naming.our_name(name).startswith(root)]:
                return naming, root, names
    raise CheckpointError(
        f"{shown_path(folder)} holds no tensor under {shown(prefix)}: give the name of a Mamba layer's mixer"
    )


def _fill(matching: Matching, source: TensorSource, tp: TensorParallel, progress: Progress | None) -> None:
    total = sum(_rank_bytes(source, entry, tp) for entry in matching)
    done = 0
    for entry in matching:
        # In the file's dtype until the parameter takes it: A, D and dt bias go to float32 directly.
        device = entry.tensor.param.device
        rows = [rows.to(device=device) for rows in entry.read_spans(source, tp.rank, tp.size)]
        entry.tensor.load(entry.shard.assemble(rows, tp.rank, tp.size), entry.dtype(source))
        done += _rank_bytes(source, entry, tp)
        if progress is not None:
            progress("loading weights", done, total)


def _rank_bytes(source: TensorSource, entry: Entry, tp: TensorParallel) -> int:
    return prod(local_shape(entry.shard, tp.rank, tp.size)) * entry.dtype(source).itemsize
