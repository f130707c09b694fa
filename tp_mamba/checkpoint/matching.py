"""Pairing the tensors of a checkpoint with the parameters of a model, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.names import EMBEDDING, LM_HEAD, canonical_name
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.parallel.sharding import Shard, ShardedTensor

WEIGHT_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter and the tensors that fill it."""

    tensor: ShardedTensor
    stored_names: tuple[str, ...]
    """Names in the source: of what is joined to the full tensor, in order, or of the full tensor itself."""

    @property
    def name(self) -> str:
        """Canonical name: the key in the files this package writes."""
        return self.tensor.name

    @property
    def shard(self) -> Shard:
        """How the tensor is cut, with the sources that the stored names stand for."""
        shard = self.tensor.shard
        return shard if len(self.stored_names) > 1 else replace(shard, sources=())

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
class Comparison:
    """How a source and the parameters it should fill compare, down to every difference.

    Tensors are named as the source names them, missing ones by their canonical names.
    """

    matching: Matching
    """The parameters that have a tensor, fitting or not."""
    duplicate: list[tuple[str, str]]
    """Two names of one tensor."""
    missing: list[str]
    unknown: list[str]
    misshapen: list[str]
    wrong_dtype: list[str]
    refusal: str | None
    """Why loading refuses the source, in one sentence; None if nothing differs."""


def compare(
    tensors: Iterable[ShardedTensor], source: TensorSource, *, names: Sequence[str] | None = None
) -> Comparison:
    """Compare ``tensors`` (of canonical names) with those of ``source``, by headers alone.

    A model without an ``lm_head.weight`` parameter of its own ties it to the embedding; its file may then hold
    either of the two, or both, which :func:`verify_tied` compares.

    Args:
        names: the tensors of ``source`` to consider; by default all of them.
    """
    stored, duplicate = _by_canonical_name(source.names() if names is None else names)
    tied_copy = None
    wanted = {tensor.name: tensor for tensor in tensors}
    if EMBEDDING in wanted and LM_HEAD not in wanted and LM_HEAD in stored:
        tied_copy = stored.pop(LM_HEAD)
        if EMBEDDING not in stored:
            stored[EMBEDDING], tied_copy = tied_copy, None
    entries: list[Entry] = []
    missing: list[str] = []
    known: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in wanted.values():
        found = (tensor.name,) if tensor.name in stored else tensor.names
        absent = [name for name in found if name not in stored]
        missing += absent
        known.update(found)
        if not absent:
            entry = Entry(tensor, tuple(stored[name] for name in found))
            entries.append(entry)
            shapes |= zip(entry.stored_names, entry.shard.source_shapes(), strict=True)
    if tied_copy is not None:
        shapes[tied_copy] = wanted[EMBEDDING].shard.shape
    unknown = [stored[name] for name in stored if name not in known]
    misshapen = [name for name, shape in shapes.items() if source.shape(name) != shape]
    wrong_dtype = [name for name in shapes if source.dtype(name) not in WEIGHT_DTYPES]
    refusal = None
    if duplicate:
        first, second = duplicate[0]
        refusal = f"the checkpoint holds both {first} and {second}, two names of one tensor: remove one"
    elif missing:
        refusal = (
            f"the checkpoint lacks {_first(missing)}, which its config.json asks for: use the config.json that "
            "belongs to these weights"
        )
    elif unknown:
        refusal = (
            f"the checkpoint holds {_first(unknown)}, which its config.json has no place for: use the config.json "
            "that belongs to these weights"
        )
    elif misshapen:
        name = misshapen[0]
        refusal = (
            f"{name} has shape {list(source.shape(name))}, config.json asks for {list(shapes[name])}: use "
            "the config.json that belongs to these weights"
        )
    elif wrong_dtype:
        name = wrong_dtype[0]
        refusal = (
            f"{name} has dtype {_short(source.dtype(name))}, supported are "
            f"{', '.join(map(_short, WEIGHT_DTYPES))}: convert the checkpoint to one of them"
        )
    matching = Matching(entries, tied_copy)
    return Comparison(matching, duplicate, missing, unknown, misshapen, wrong_dtype, refusal)


def match(
    tensors: Iterable[ShardedTensor], source: TensorSource, *, names: Sequence[str] | None = None
) -> Matching:
    """Pair ``tensors`` with those of ``source``, strictly; arguments as :func:`compare`.

    Raises:
        CheckpointError: a tensor is missing, unknown, present under two names, or has another shape than its
            parameter or a dtype that is no weight's.
    """
    comparison = compare(tensors, source, names=names)
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
    copy = Entry(embedding.tensor, (matching.tied_copy,))
    rows = (entry.read_spans(source, rank, n) for entry in (embedding, copy))
    if not all(_same_bits(a, b) for a, b in zip(*rows, strict=True)):
        raise CheckpointError(
            f"{matching.tied_copy} differs from {embedding.stored_names[0]}, but config.json ties the two: set "
            "tie_word_embeddings to false in config.json"
        )


def _by_canonical_name(names: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Canonical to source name, and the pairs of source names that share a canonical one."""
    stored: dict[str, str] = {}
    duplicate = []
    for name in names:
        first = stored.setdefault(canonical_name(name), name)
        if first != name:
            duplicate.append((first, name))
    return stored, duplicate


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Compared as bytes: NaN equals itself, and 0 is not -0.
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
