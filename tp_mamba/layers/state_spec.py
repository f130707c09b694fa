"""What state a layer keeps for each sequence, as a declaration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpec:
    """One tensor of a layer's state: what one sequence needs of it.

    Raises:
        ValueError: a dimension that ``shape`` does not have, or one that ``granularity`` does not divide.
    """

    name: str
    """Names it among the tensors of its layer."""

    shape: tuple[int, ...]
    """Shape for one sequence, whole: not divided over the ranks, without padding."""

    dtype: torch.dtype
    """Dtype in which it is kept."""

    dim: int | None = None
    """The tensor dimension that is cut over the ranks; None: every rank keeps all of it."""

    granularity: int = 1
    """Elements along ``dim`` that stay together on one rank, such as those of an attention head."""

    contiguous: int = -1
    """The dimension whose elements lie side by side in memory, the last by default."""

    def __post_init__(self) -> None:
        dims = len(self.shape)
        for what, dim in (("dim", self.dim), ("contiguous", self.contiguous)):
            if dim is not None and not -dims <= dim < dims:
                raise ValueError(
                    f"the state {self.name} of shape {list(self.shape)} has no dimension {dim}: give {what} one of its "
                    f"{dims}"
                )
        self.stacked(1)

    def stacked(self, layers: int) -> Shard:
        """How the states of one sequence in ``layers`` layers, ``[layers, *shape]``, are divided over the ranks."""
        dim = None if self.dim is None else self.dim % len(self.shape) + 1
        return Shard(shape=(layers, *self.shape), dim=dim, granularity=self.granularity)

    def allocate(self, layers: int, slots: int, n: int, device: torch.device) -> torch.Tensor:
        """Zeros ``[layers, slots, *shape]``, this rank's part of ``n``."""
        _, *local = self.stacked(layers).local_shape(n)
        inner = local.pop(self.contiguous)
        zeros = torch.zeros(layers, slots, *local, inner, dtype=self.dtype, device=device)
        return zeros.movedim(-1, 2 + self.contiguous % len(self.shape))

    def local_bytes(self, n: int) -> int:
        """Bytes of one sequence in one layer, on one rank of ``n``."""
        return torch.Size(self.stacked(1).local_shape(n)).numel() * self.dtype.itemsize


@runtime_checkable
class StatefulLayer(Protocol):
    """A layer whose state a cache can keep.

    It may also have a ``state_type``, which makes what the layer takes as its state of the tensors of
    :meth:`state_spec`, in that order; without one they come as a tuple.
    """

    tp: TensorParallel

    def state_spec(self) -> Sequence[StateSpec]:
        """What it keeps for each sequence; nothing for a layer without memory."""


def state_type(layer: StatefulLayer) -> Callable[..., Any]:
    """Makes ``layer``'s state of its tensors."""
    return getattr(layer, "state_type", lambda *tensors: tensors)
