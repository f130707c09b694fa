"""Pairing the tensors of a checkpoint with the parameters of a model, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.names import EMBEDDING, LM_HEAD, canonical_name
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.parallel.sharding import Split

WEIGHT_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter and the tensor that fills it."""

    name: str
    """Canonical name: the key in the files this package writes."""
    stored_name: str
    """Name in the source."""
    param: nn.Parameter

    @property
    def split(self) -> Split:
        return self.param.sharded.split  # type: ignore[attr-defined]


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
    parameters: Mapping[str, nn.Parameter], source: TensorSource, *, names: Sequence[str] | None = None
) -> Comparison:
    """Compare ``parameters`` (canonical names) with the tensors of ``source``, by headers alone.

    A model without an ``lm_head.weight`` parameter of its own ties it to the embedding; its file may then hold
    either of the two, or both, which :func:`verify_tied` compares.

    Args:
        names: the tensors of ``source`` to consider; by default all of them.
    """
    stored, duplicate = _by_canonical_name(source.names() if names is None else names)
    tied_copy = None
    if EMBEDDING in parameters and LM_HEAD not in parameters and LM_HEAD in stored:
        tied_copy = stored.pop(LM_HEAD)
        if EMBEDDING not in stored:
            stored[EMBEDDING], tied_copy = tied_copy, None
    entries = [Entry(name, stored[name], param) for name, param in parameters.items() if name in stored]
    splits = {entry.stored_name: entry.split for entry in entries}
    if tied_copy is not None:
        splits[tied_copy] = parameters[EMBEDDING].sharded.split  # type: ignore[attr-defined]
    missing = [name for name in parameters if name not in stored]
    unknown = [stored[name] for name in stored if name not in parameters]
    misshapen = [name for name, split in splits.items() if source.shape(name) != split.shape]
    wrong_dtype = [name for name in splits if source.dtype(name) not in WEIGHT_DTYPES]
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
            f"{name} has shape {list(source.shape(name))}, config.json asks for {list(splits[name].shape)}: use "
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
    parameters: Mapping[str, nn.Parameter], source: TensorSource, *, names: Sequence[str] | None = None
) -> Matching:
    """Pair ``parameters`` with the tensors of ``source``, strictly; arguments as :func:`compare`.

    Raises:
        CheckpointError: a tensor is missing, unknown, present under two names, or has another shape than its
            parameter or a dtype that is no weight's.
    """
    comparison = compare(parameters, source, names=names)
    if comparison.refusal is not None:
        raise CheckpointError(comparison.refusal)
    return comparison.matching


def read_pieces(source: TensorSource, name: str, split: Split, rank: int, n: int) -> list[torch.Tensor]:
    """The rows of tensor ``name`` that ``rank`` of ``n`` holds: one piece a part, or the whole if replicated."""
    if split.dim is None:
        return [source.read_all(name)]
    return [source.read(name, split.dim, span.start, span.stop) for span in split.spans(rank, n)]


def verify_tied(source: TensorSource, matching: Matching, rank: int, n: int) -> None:
    """Compare a tied ``lm_head.weight`` with the embedding, bit by bit, over the rows of ``rank``.

    Raises:
        CheckpointError: they differ.
    """
    if matching.tied_copy is None:
        return
    embedding = next(entry for entry in matching if entry.name == EMBEDDING)
    pieces = (
        read_pieces(source, name, embedding.split, rank, n)
        for name in (embedding.stored_name, matching.tied_copy)
    )
    if not all(_same_bits(a, b) for a, b in zip(*pieces, strict=True)):
        raise CheckpointError(
            f"{matching.tied_copy} differs from {embedding.stored_name}, but config.json ties the two: set "
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
