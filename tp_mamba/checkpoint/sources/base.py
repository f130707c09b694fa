"""The one interface behind which a checkpoint's files stand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.quoting import shown, shown_path

_OF_DIFFERENT: Final = "index and files are of different checkpoints, fetch them again"


class TensorSource(ABC):
    """The tensors of a checkpoint under the names its files use, readable slice by slice.

    Opening one reads headers only. Tensors come back on the CPU, in the dtype of the file, and may be views
    of a mapped file: copy what is to be changed.

    Attributes:
        bytes_read: bytes of tensor data fetched so far.
    """

    names_are_ours = False
    """Whether tensors have this package's names, whatever the family of the model calls them in its own files."""

    def __init__(self) -> None:
        self.bytes_read = 0

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of tensor ``name``."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype of tensor ``name`` in the file."""

    def dtype_name(self, name: str) -> str:
        """What the file calls that dtype; also where it is one that torch or this package does not have."""
        return str(self.dtype(name)).removeprefix("torch.")

    @abstractmethod
    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """``full.narrow(dim, start, stop - start)``; only that much is read."""

    def read_all(self, name: str) -> torch.Tensor:
        """The full tensor ``name``, which has at least one dimension."""
        return self.read(name, 0, 0, self.shape(name)[0])

    def _empty(self, name: str, dim: int) -> torch.Tensor:
        """What a slice of no rows reads, without asking the file."""
        shape = self.shape(name)
        return torch.empty((*shape[:dim], 0, *shape[dim + 1 :]), dtype=self.dtype(name))


def merge_listings(
    listings: Sequence[tuple[Path, list[str]]], weight_map: dict[str, Path] | None
) -> dict[str, Path]:
    """Which file holds each tensor, from the names found in every file.

    Args:
        listings: for each file, the tensors it holds.
        weight_map: what the checkpoint's index claims, or None where there is no index.

    Raises:
        CheckpointError: a tensor is in two files, or files and index do not agree.
    """
    holder: dict[str, Path] = {}
    for name, path in _pairs(listings):
        if name in holder:
            raise CheckpointError(
                f"{shown(name)} is both in {shown_path(holder[name])} and in {shown(path.name)}: remove one of the two "
                "files"
            )
        holder[name] = path
    if weight_map is None:
        return holder
    for name, path in weight_map.items():
        if holder.get(name) != path:
            raise CheckpointError(
                f"the index says that {shown(name)} is in {shown_path(path)}, but it is not there: {_OF_DIFFERENT}"
            )
    if extra := sorted(set(holder) - set(weight_map)):
        raise CheckpointError(
            f"{shown_path(holder[extra[0]])} holds {shown(extra[0])}, which the index does not list: {_OF_DIFFERENT}"
        )
    return holder


def _pairs(listings: Sequence[tuple[Path, list[str]]]) -> Iterator[tuple[str, Path]]:
    for path, names in listings:
        for name in names:
            yield name, path
