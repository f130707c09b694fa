"""Which part of each full tensor a rank of the mesh ``[M, n]`` holds, and how checkpoints are told of it.

A tensor that tensor parallelism cuts along one dimension is cut over the data ranks along another, so that what a rank
holds is one block of the full tensor and an ordinary ``DTensor`` describes it: over FSDP2's own choice, rows of rows,
none does, and saves wrong checkpoints in silence. Two things are done before it is wrapped:

* a tensor of several pieces, such as ``in_proj [2D, H]``, is viewed with a dimension for them, ``[2, D, H]``;
* the channels that pad ``D`` to a multiple of ``n`` are cut off. What is left are the shards of ``torch.chunk``.

So a file depends neither on ``n`` nor on ``M``, and can be loaded at any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as Cut

from tp_mamba.parallel.sharding import Shard
from tp_mamba.training.ranks import Ranks


def data_dim(shard: Shard, n: int, M: int) -> int | None:
    """The dimension of a rank's part along which the data ranks divide it; None: each of them holds all of it.

    That is so for what is small, the vectors and rows per channel, and for what ``M`` does not divide: FSDP2 cuts
    other dimensions than the first evenly or not at all.
    """
    local = shard.local_shape(n)
    if M == 1 or shard.wide:
        return None
    if shard.dim is None or shard.dim > 0:
        return 0
    if len(local) != 2 or local[1] % M:
        return None
    return 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor is held; made by :func:`layout_of`."""

    shape: tuple[int, ...]
    """Of the full tensor, its pieces viewed as a dimension."""
    placements: tuple[Placement, Placement]
    """Over the axes of the mesh, data first."""
    split: tuple[int, int] | None
    """(dimension, pieces) to be viewed; None for one piece."""
    real: tuple[int, int] | None
    """(dimension of the view, size) that is left when padding is cut off; None where nothing is cut."""

    def view(self, local: torch.Tensor) -> torch.Tensor:
        """What this rank holds of the full tensor: a view of its parameter, or of what is shaped like it."""
        if self.split is not None:
            dim, pieces = self.split
            local = local.unflatten(dim, (pieces, local.shape[dim] // pieces))
        return local if self.real is None else local.narrow(self.real[0], 0, self.real[1])

    def describe(self, local: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """``local``, a contiguous CPU tensor of the shape of :meth:`view`, as checkpoints take it."""
        if ranks.files is None:
            return local
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local,
            ranks.files,
            self.placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=stride,
        )


def layout_of(shard: Shard, rank: int, n: int, M: int) -> Layout:
    """How tensor-parallel rank ``rank`` of ``n`` holds its part of a tensor, with ``M`` data ranks.

    Raises:
        ValueError: pieces of different sizes, or units that stay whole, which no DTensor describes.
    """
    over_data, cut = data_dim(shard, n, M), shard.dim
    if cut is None:
        return Layout(shard.shape, (_placed(over_data), Replicate()), None, None)
    if len(set(shard.pieces)) > 1 or shard.granularity != 1:
        raise ValueError(
            f"a tensor of pieces {list(shard.pieces)} in units of {shard.granularity} cannot be kept in a training "
            "checkpoint: cut pieces of one size, in single rows"
        )
    span = shard.spans(rank, n)[0]
    count, shape, split = len(shard.pieces), shard.shape, None
    if count > 1:
        split = (cut, count)
        shape = (*shape[:cut], count, shard.pieces[0], *shape[cut + 1 :])
        if over_data is not None and over_data > cut:
            over_data += 1
        cut += 1
    return Layout(shape, (_placed(over_data), Cut(cut)), split, (cut, span.stop - span.start))


def _placed(dim: int | None) -> Placement:
    return Replicate() if dim is None else Cut(dim)
