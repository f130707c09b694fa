"""Pairing the tensors of a checkpoint with the parameters of a model, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.names import Naming, filed, naming_of
from tp_mamba.checkpoint.refusals import Differences, refusal_of
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.kernels.common.dtypes import FLOATS
from tp_mamba.models.names import EMBEDDING, LM_HEAD
from tp_mamba.models.registry import Family
from tp_mamba.parallel.sharding import Shard, ShardedTensor
from tp_mamba.quoting import shown

BASE_GROUP: Final = "base"
"""The group of tensors that every checkpoint of a model has."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter and the tensors that fill it."""

    tensor: ShardedTensor
    stored_names: tuple[str, ...]
    """Names in the source: of what is joined to the full tensor, in order, or of the full tensor itself."""
    filed: Shard
    """How a full checkpoint of the model's family keeps it: ``filed.sources`` are the names in its files."""

    @property
    def name(self) -> str:
        """The name of the tensor in this package: the key in the files that ``tp-mamba shard`` writes."""
        return self.tensor.name

    @property
    def shard(self) -> Shard:
        """How the tensor is cut, with the sources that the stored names stand for."""
        return self.filed if len(self.stored_names) > 1 else replace(self.filed, sources=())

    def dtype(self, source: TensorSource) -> torch.dtype:
        """The dtype of the full tensor in ``source``."""
        dtype = source.dtype(self.stored_names[0])
        for name in self.stored_names[1:]:
            dtype = torch.promote_types(dtype, source.dtype(name))
        return dtype

    def read_spans(self, source: TensorSource, rank: int, n: int) -> list[torch.Tensor]:
        """The rows that ``rank`` of ``n`` holds: one tensor per piece, or the whole if replicated."""

        def read(i: int, dim: int | None, start: int, stop: int) -> torch.Tensor:
            name = self.stored_names[i]
            return source.read_all(name) if dim is None else source.read(name, dim, start, stop)

        return self.shard.read_spans(read, rank, n)


@dataclass(frozen=True, slots=True)
class Matching:
    """Every parameter with its tensor, and the copy of a tied tensor where the file has one."""

    entries: Sequence[Entry]
    tied_copy: str | None
    """Source name of an ``lm_head.weight`` that must equal the embedding."""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)


@dataclass(frozen=True, slots=True)
class Comparison(Differences):
    """How a source and the parameters it should fill compare, down to every difference.

    Tensors are named as the source names them, missing ones as the model's family does.
    """

    matching: Matching
    """The parameters that have a tensor, fitting or not."""
    refusal: str | None
    """Why loading refuses the source, in one sentence; None if nothing differs."""


def compare(
    tensors: Iterable[ShardedTensor],
    source: TensorSource,
    family: Family,
    *,
    names: Sequence[str] | None = None,
    naming: Naming | None = None,
    group: str = BASE_GROUP,
) -> Comparison:
    """Compare ``tensors`` of a model of ``family`` with those of ``source``, by headers alone.

    Those of ``group`` are all wanted, and those of any other group as soon as the source holds one of them.

    A model without an ``lm_head.weight`` parameter of its own ties it to the embedding; its file may then hold
    either of the two, or both, which :func:`verify_tied` compares.

    Args:
        names: the tensors of ``source`` to consider; by default all of them.
        naming: how to read their names; by default it is found.
    """
    model = {tensor.name: tensor for tensor in tensors}
    of_model = {name for tensor in model.values() for name in (tensor.name, *tensor.names)}
    naming = naming or naming_of(source, family, of_model | {LM_HEAD})
    stored = _by_our_name(source.names() if names is None else names, naming)
    tied_copy = None
    if EMBEDDING in model and LM_HEAD not in model and LM_HEAD in stored:
        if EMBEDDING in stored:
            (tied_copy, *_) = stored.pop(LM_HEAD)
        else:
            stored[EMBEDDING] = stored.pop(LM_HEAD)
    groups = {group} | {
        tensor.shard.group
        for tensor in model.values()
        if any(name in stored for name in (tensor.name, *tensor.names))
    }
    entries: list[Entry] = []
    missing: list[str] = []
    duplicate: list[tuple[str, str]] = []
    used: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in model.values():
        if tensor.shard.group not in groups:
            continue
        how = filed(tensor, family)
        found, absent = _find(tensor, how, stored, naming)
        missing += absent
        held = [name for ours in {tensor.name, *tensor.names} for name in stored.get(ours, ())]
        used.update(held)
        if found:
            duplicate += [(found[0], name) for name in held if name not in found]
            entry = Entry(tensor, found, how)
            entries.append(entry)
            shapes |= zip(found, entry.shard.source_shapes(), strict=True)
    if tied_copy is not None:
        shapes[tied_copy] = model[EMBEDDING].shard.shape
    differences = Differences(
        duplicate=duplicate,
        missing=missing,
        unknown=[name for held in stored.values() for name in held if name not in used],
        misshapen=[name for name, shape in shapes.items() if source.shape(name) != shape],
        wrong_dtype=[
            name for entry in entries for name in entry.stored_names if not _fits(entry, source, name)
        ],
        shapes=shapes,
    )
    refusal = refusal_of(differences, source, naming)
    return Comparison(
        **{field.name: getattr(differences, field.name) for field in fields(Differences)},
        matching=Matching(entries, tied_copy),
        refusal=refusal,
    )


def match(
    tensors: Iterable[ShardedTensor],
    source: TensorSource,
    family: Family,
    *,
    names: Sequence[str] | None = None,
    naming: Naming | None = None,
    group: str = BASE_GROUP,
) -> Matching:
    """Pair ``tensors`` with those of ``source``, strictly; arguments as :func:`compare`.

    Raises:
        CheckpointError: a tensor is missing, unknown, present under two names, or has another shape than its
            parameter or a dtype that is no weight's.
    """
    comparison = compare(tensors, source, family, names=names, naming=naming, group=group)
    if comparison.refusal is not None:
        raise CheckpointError(comparison.refusal)
    return comparison.matching


def verify_tied(source: TensorSource, matching: Matching, rank: int, n: int) -> None:
    """Compare a tied ``lm_head.weight`` with the embedding, bit by bit, over the rows of ``rank``.

    Raises:
        CheckpointError: they differ.
    """
    if matching.tied_copy is None:
        return
    embedding = next(entry for entry in matching if entry.name == EMBEDDING)
    copy = replace(embedding, stored_names=(matching.tied_copy,))
    rows = (entry.read_spans(source, rank, n) for entry in (embedding, copy))
    if not all(_same_bits(a, b) for a, b in zip(*rows, strict=True)):
        raise CheckpointError(
            f"{shown(matching.tied_copy)} differs from {shown(embedding.stored_names[0])}, but config.json ties the "
            "two: set tie_word_embeddings to false in config.json"
        )


def _by_our_name(names: Sequence[str], naming: Naming) -> dict[str, list[str]]:
    """Name of a model's tensor -> the source's tensors that claim to fill it."""
    stored: dict[str, list[str]] = {}
    for name in names:
        stored.setdefault(naming.our_name(name), []).append(name)
    return stored


def _find(
    tensor: ShardedTensor, how: Shard, stored: Mapping[str, list[str]], naming: Naming
) -> tuple[tuple[str, ...], list[str]]:
    """The names in the source that fill ``tensor`` together, or else those of a file that are absent."""
    held = {naming.file_name(name): name for ours in tensor.names for name in stored.get(ours, ())}
    whole = {naming.file_name(name): name for name in stored.get(tensor.name, ())}
    if len(how.sources) == 1 or naming.ours:
        return (
            ((next(iter(whole.values())),), [])
            if whole
            else ((), [tensor.name if naming.ours else how.sources[0]])
        )
    absent = [name for name in how.sources if name not in held]
    if absent and tensor.name in whole and tensor.name not in how.sources:
        return (whole[tensor.name],), []
    return ((), absent) if absent else (tuple(held[name] for name in how.sources), [])


def _fits(entry: Entry, source: TensorSource, name: str) -> bool:
    """Whether the parameter can hold what the file does: any weight's dtype, or its own where that is not one."""
    held = entry.tensor.param.dtype
    allowed = FLOATS if held in FLOATS else {held}
    try:
        return source.dtype(name) in allowed
    except CheckpointError:  # a dtype that torch does not have
        return False


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Compared as bytes: NaN equals itself, and 0 is not -0.
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
