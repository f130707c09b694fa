"""How the tensors of a full checkpoint are divided over the tensor-parallel ranks, as a table on each module.

A module that owns parameters has a table ``module.shards``: attribute -> :class:`Shard`. Loader, saver, re-sharder,
planner, initialisation and tests read that table through :func:`sharded_tensors`; nothing else in the project
knows how a tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_mamba.parallel.group import TensorParallel

ReadRows = Callable[[int, int | None, int, int], torch.Tensor]
"""Rows of one of the file's tensors: ``(source number, dim, start, stop)``; all of it where ``dim`` is None."""


def padded_size(size: int, n: int) -> int:
    """The smallest multiple of ``n`` that is at least ``size``."""
    return -(-size // n) * n


@dataclass(frozen=True, slots=True)
class Span:
    """A run of rows along the cut dimension: ``full[start:stop]`` belongs at ``local[offset:offset+stop-start]``."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Which slice of a full tensor each rank holds, and which tensors of a file the full tensor is made of.

    The cut dimension consists of pieces (``in_proj`` has two: x and z) that are cut one by one: each piece is padded
    at its end with zeros to ``n`` equal shares of whole units of ``granularity`` rows, and a rank holds its share of
    every piece, one after the other.

    Raises:
        ValueError: ``pieces`` that do not add up to the dimension or are no multiples of ``granularity``, a
            dimension that does not exist, or sources that do not divide the dimension along which they are joined.
    """

    shape: tuple[int, ...]
    """Shape of the full tensor, without padding."""

    dim: int | None = None
    """The tensor dimension that is cut; None: every rank holds the whole tensor."""

    pieces: tuple[int, ...] = ()
    """Sizes of the independent pieces along ``dim``; by default it is one piece."""

    granularity: int = 1
    """Rows of a piece that stay together on one rank, such as those of an attention head."""

    wide: bool = False
    """Held in at least float32 whatever the model's dtype (A, D, dt bias: they feed exp and softplus)."""

    sources: tuple[str, ...] = ()
    """Names of the file's tensors, relative to the module; by default the attribute's own name."""

    join: int = 0
    """The dimension along which several sources are joined: each is one piece of it where the pieces are along this
    dimension and as many, else all are of equal size."""

    group: str = "base"
    """Tensors of one group are loaded together, with none missing and none left over."""

    def __post_init__(self) -> None:
        rank = len(self.shape)
        if self.dim is None:
            if self.pieces or self.granularity != 1:
                raise ValueError(
                    f"got pieces {list(self.pieces)} and granularity {self.granularity} for a tensor that is not cut: "
                    "give the dim along which it is"
                )
        else:
            if not 0 <= self.dim < rank:
                raise ValueError(
                    f"got dim {self.dim} of a tensor with {rank} dimensions: choose 0 to {rank - 1}"
                )
            size, unit = self.shape[self.dim], self.granularity
            object.__setattr__(self, "pieces", tuple(self.pieces) or (size,))
            if (
                unit < 1
                or sum(self.pieces) != size
                or any(piece < 0 or piece % unit for piece in self.pieces)
            ):
                raise ValueError(
                    f"got pieces {list(self.pieces)} in units of {unit} for a dimension of size {size}: they must be "
                    "multiples of the unit and add up to the size"
                )
        if len(self.sources) > 1:
            self.source_shapes()

    def local_shape(self, n: int) -> tuple[int, ...]:
        """Shape of one rank's part, padding included."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], sum(self._local_pieces(n)), *self.shape[self.dim + 1 :])

    def spans(self, rank: int, n: int) -> list[Span]:
        """The rows of the full tensor that ``rank`` holds: one span per piece, empty where only padding is left."""
        if self.dim is None:
            raise ValueError("a replicated tensor has no spans: read it whole")
        spans, start, offset = [], 0, 0
        for piece, local in zip(self.pieces, self._local_pieces(n), strict=True):
            first, last = min(rank * local, piece), min((rank + 1) * local, piece)
            spans.append(Span(start + first, start + last, offset))
            start, offset = start + piece, offset + local
        return spans

    def shard(self, full: torch.Tensor, rank: int, n: int) -> torch.Tensor:
        """This rank's part of ``full``, zero-padded to :meth:`local_shape`; a copy, except where replicated."""
        if self.dim is None:
            return full
        rows = [full.narrow(self.dim, s.start, s.stop - s.start) for s in self.spans(rank, n)]
        return self.assemble(rows, rank, n)

    def assemble(self, rows: Sequence[torch.Tensor], rank: int, n: int) -> torch.Tensor:
        """Lay the rows of :meth:`spans`, in that order, into one zero-padded part."""
        if self.dim is None:
            return rows[0]
        local = rows[0].new_zeros(self.local_shape(n))
        for span, piece in zip(self.spans(rank, n), rows, strict=True):
            local.narrow(self.dim, span.offset, span.stop - span.start).copy_(piece)
        return local

    def trim(self, local: torch.Tensor, rank: int, n: int) -> list[torch.Tensor]:
        """The inverse of :meth:`assemble`: views of the real rows, one per piece, padding left out."""
        if self.dim is None:
            return [local]
        return [local.narrow(self.dim, s.offset, s.stop - s.start) for s in self.spans(rank, n)]

    def merge(self, locals_: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from every rank's part, in rank order."""
        if self.dim is None:
            return locals_[0]
        n = len(locals_)
        trimmed = [self.trim(local, rank, n) for rank, local in enumerate(locals_)]
        return torch.cat([rows[p] for p in range(len(self.pieces)) for rows in trimmed], dim=self.dim)

    def replace_piece(self, local: torch.Tensor, piece: int, full: torch.Tensor, rank: int, n: int) -> None:
        """Overwrite the rows of ``local`` that come of piece number ``piece``, given whole as ``full``."""
        assert self.dim is not None
        span, before = self.spans(rank, n)[piece], sum(self.pieces[:piece])
        rows = full.narrow(self.dim, span.start - before, span.stop - span.start)
        local.narrow(self.dim, span.offset, span.stop - span.start).copy_(rows)

    def piece_shape(self, piece: int) -> tuple[int, ...]:
        """Shape of piece number ``piece`` of the full tensor."""
        assert self.dim is not None
        return (*self.shape[: self.dim], self.pieces[piece], *self.shape[self.dim + 1 :])

    def source_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the file's tensors, in the order of ``sources``."""
        if len(self.sources) < 2:
            return [self.shape]
        return [
            (*self.shape[: self.join], size, *self.shape[self.join + 1 :]) for size in self._source_sizes()
        ]

    def split_sources(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Views of a full tensor: the file's tensors it is made of, in the order of ``sources``."""
        if len(self.sources) < 2:
            return [full]
        return list(full.split(self._source_sizes(), dim=self.join))

    def read_spans(self, read: ReadRows, rank: int, n: int) -> list[torch.Tensor]:
        """What :meth:`assemble` takes, read from the file's tensors; the whole tensor where it is not cut.

        Args:
            read: gives the rows of the file's tensors.
        """
        if self.dim is None:
            return [self._joined([read(i, None, 0, 0) for i in range(len(self.source_shapes()))])]
        return [self._read_span(read, span.start, span.stop) for span in self.spans(rank, n)]

    def _read_span(self, read: ReadRows, start: int, stop: int) -> torch.Tensor:
        if len(self.sources) < 2 or self.join != self.dim:
            return self._joined([read(i, self.dim, start, stop) for i in range(max(1, len(self.sources)))])
        if start == stop:
            return read(0, self.dim, 0, 0)
        found, before = [], 0
        for i, size in enumerate(self._source_sizes()):
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                found.append(read(i, self.dim, first, last))
            before += size
        return self._joined(found)

    def _joined(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=self.join)

    def _source_sizes(self) -> list[int]:
        """Size of each source along ``join``."""
        if self.join == self.dim and len(self.pieces) == len(self.sources):
            return list(self.pieces)
        size, count = self.shape[self.join], len(self.sources)
        if size % count:
            raise ValueError(
                f"{count} sources cannot be of equal size along dimension {self.join} of size {size}: declare one "
                "piece per source along it"
            )
        return [size // count] * count

    def _local_pieces(self, n: int) -> list[int]:
        """Rows of each piece that one rank holds, padding included."""
        unit = self.granularity
        return [padded_size(piece // unit, n) // n * unit for piece in self.pieces]


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """One entry of a module's table, with the place of the module in its model."""

    path: str
    """Name of the module, relative to where the search began, with the prefix given there."""
    module: Any
    """A :class:`tp_mamba.parallel.module.ShardedModule`."""
    attribute: str

    @property
    def shard(self) -> Shard:
        return self.module.shards[self.attribute]

    @property
    def param(self) -> torch.Tensor:
        """What the module holds now under that name."""
        return getattr(self.module, self.attribute)

    @property
    def tp(self) -> TensorParallel:
        return self.module.tp

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the file's tensors that it is made of; usually one."""
        return tuple(self._named(source) for source in self.shard.sources or (self.attribute,))

    @property
    def name(self) -> str:
        """Name in a checkpoint; the attribute's where several tensors of the file are joined."""
        return self.names[0] if len(self.names) == 1 else self._named(self.attribute)

    def load(self, local: torch.Tensor, file_dtype: torch.dtype | None = None) -> None:
        """Fill the parameter from this rank's part (:meth:`Shard.local_shape`); remember the file's dtype if given."""
        self.module.load_shard(self.attribute, local)
        if file_dtype is not None:
            self.module.file_dtypes[self.attribute] = file_dtype

    def read(self) -> torch.Tensor:
        """This rank's part as a checkpoint would hold it."""
        return self.module.read_shard(self.attribute)

    @property
    def file_dtype(self) -> torch.dtype | None:
        """The dtype that the tensor had in the file it was loaded from; None before loading."""
        return self.module.file_dtypes.get(self.attribute)

    def _named(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def sharded_tensors(module: nn.Module, prefix: str = "") -> Iterator[ShardedTensor]:
    """Every entry of every table in ``module`` and below it, in the order of its modules; a shared parameter once.

    Args:
        prefix: the name of ``module`` itself in a checkpoint.
    """
    seen: set[int] = set()
    for path, owner in module.named_modules(prefix=prefix.rstrip(".")):
        for attribute in getattr(owner, "shards", ()):
            tensor = ShardedTensor(path, owner, attribute)
            if id(tensor.param) not in seen:
                seen.add(id(tensor.param))
                yield tensor
