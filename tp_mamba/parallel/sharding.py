"""How one tensor of a full checkpoint is divided over the tensor-parallel ranks, as a declaration.

Loader, saver, re-sharder, planner and tests all read the same :class:`Split`; nothing else in the project
knows how a tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tp_mamba.parallel.group import TensorParallel


def padded_size(size: int, n: int) -> int:
    """The smallest multiple of ``n`` that is at least ``size``."""
    return -(-size // n) * n


@dataclass(frozen=True, slots=True)
class Span:
    """A run of rows along the split dimension: ``full[start:stop]`` belongs at ``shard[offset:offset+stop-start]``."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which slice of a full tensor each rank holds.

    A full dimension of ``parts`` equal pieces (``in_proj`` has two: x and z) is cut piece by piece: every
    piece is padded with zeros to a multiple of ``n``, and each rank takes its ``1/n`` of every piece, laid
    one after the other.
    """

    shape: tuple[int, ...]
    """Shape of the full tensor in a checkpoint, without padding."""

    dim: int | None = None
    """The tensor dimension that is cut; None: every rank holds the whole tensor."""

    parts: int = 1
    """Independent equal pieces along ``dim``."""

    float32: bool = False
    """Held in at least float32 whatever the model's dtype (A, D, dt bias: they feed exp and softplus)."""

    stored_as: str | None = None
    """Name in a checkpoint where it differs from the parameter's (``A_log`` for ``A``)."""

    def local_shape(self, n: int) -> tuple[int, ...]:
        """Shape of one rank's shard, padding included."""
        if self.dim is None:
            return self.shape
        part = padded_size(self.shape[self.dim] // self.parts, n) // n
        return (*self.shape[: self.dim], self.parts * part, *self.shape[self.dim + 1 :])

    def spans(self, rank: int, n: int) -> list[Span]:
        """The rows of the full tensor that ``rank`` holds: one span a part, empty where only padding is left."""
        if self.dim is None:
            raise ValueError("a replicated tensor has no spans: read it whole")
        part = self.shape[self.dim] // self.parts
        local = padded_size(part, n) // n
        first, last = min(rank * local, part), min((rank + 1) * local, part)
        return [Span(p * part + first, p * part + last, p * local) for p in range(self.parts)]

    def shard(self, full: torch.Tensor, rank: int, n: int) -> torch.Tensor:
        """This rank's part of ``full``, zero-padded to :meth:`local_shape`; a copy, except where replicated."""
        if self.dim is None:
            return full
        pieces = [full.narrow(self.dim, s.start, s.stop - s.start) for s in self.spans(rank, n)]
        return self.assemble(pieces, rank, n)

    def assemble(self, pieces: Sequence[torch.Tensor], rank: int, n: int) -> torch.Tensor:
        """Lay the rows of :meth:`spans`, in that order, into one zero-padded shard."""
        if self.dim is None:
            return pieces[0]
        local = pieces[0].new_zeros(self.local_shape(n))
        for span, piece in zip(self.spans(rank, n), pieces, strict=True):
            local.narrow(self.dim, span.offset, span.stop - span.start).copy_(piece)
        return local

    def trim(self, local: torch.Tensor, rank: int, n: int) -> list[torch.Tensor]:
        """The inverse of :meth:`assemble`: views of a shard's real rows, one a part, padding left out."""
        if self.dim is None:
            return [local]
        return [local.narrow(self.dim, s.offset, s.stop - s.start) for s in self.spans(rank, n)]

    def merge(self, locals_: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from every rank's shard, in rank order."""
        if self.dim is None:
            return locals_[0]
        n = len(locals_)
        trimmed = [self.trim(local, rank, n) for rank, local in enumerate(locals_)]
        return torch.cat([pieces[p] for p in range(self.parts) for pieces in trimmed], dim=self.dim)


@dataclass(eq=False, slots=True)
class Sharded:
    """What a parameter carries as ``param.sharded``: its split, its rank, and the way in and out of it."""

    split: Split
    tp: TensorParallel
    load_local: Callable[[torch.Tensor], None]
    """Fill the parameter from this rank's shard of the checkpoint's tensor (:meth:`Split.local_shape`)."""
    read_local: Callable[[], torch.Tensor]
    """This rank's shard as a checkpoint would hold it (``A_log`` where the parameter is ``A``)."""
    checkpoint_dtype: torch.dtype | None = field(default=None)
    """The dtype the tensor had in the file it was loaded from; None before loading."""


def declare(
    param: nn.Parameter,
    split: Split,
    tp: TensorParallel,
    *,
    name: str = "parameter",
    load_local: Callable[[torch.Tensor], None] | None = None,
    read_local: Callable[[], torch.Tensor] | None = None,
) -> None:
    """Attach ``split`` to ``param`` as ``param.sharded``, and ``param.weight_loader(param, loaded_weight)``.

    The weight loader takes the full tensor of a checkpoint and keeps this rank's part (vLLM's convention).
    """

    def default_load(local: torch.Tensor) -> None:
        with torch.no_grad():
            param.copy_(local)

    def weight_loader(target: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if tuple(loaded_weight.shape) != split.shape:
            raise ValueError(
                f"{name}: got a tensor of shape {list(loaded_weight.shape)}, expected the full {list(split.shape)}; "
                "pass the whole tensor of the checkpoint, the loader takes this rank's part"
            )
        target.sharded.load_local(split.shard(loaded_weight, tp.rank, tp.size))  # type: ignore[attr-defined]

    param.sharded = Sharded(  # type: ignore[attr-defined]
        split, tp, load_local or default_load, read_local or (lambda: param.detach())
    )
    param.weight_loader = weight_loader  # type: ignore[attr-defined]


def sharded_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``(name in a checkpoint, parameter)`` for every parameter of ``module``; shared ones once."""
    for name, param in module.named_parameters():
        stored_as = param.sharded.split.stored_as  # type: ignore[attr-defined]
        yield (f"{name.rpartition('.')[0]}.{stored_as}".lstrip(".") if stored_as else name), param
