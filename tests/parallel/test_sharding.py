"""How a tensor is cut: unequal pieces, whole units, several tensors of a file for one of ours."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from tp_mamba.parallel.sharding import Shard, padded_size

SHARDS = {
    "one piece": Shard(shape=(7, 3), dim=0),
    "two equal": Shard(shape=(2, 14), dim=1, pieces=(7, 7)),
    "unequal": Shard(shape=(11, 3), dim=0, pieces=(6, 1, 4)),
    "heads": Shard(shape=(40, 2), dim=0, pieces=(24, 8, 8), granularity=4),
    "fewer units than ranks": Shard(shape=(8,), dim=0, granularity=4),
    "replicated": Shard(shape=(3, 2)),
}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", list(SHARDS))
def test_merge_undoes_shard(kind: str, n: int) -> None:
    shard = SHARDS[kind]
    full = torch.arange(1.0, torch.Size(shard.shape).numel() + 1).reshape(shard.shape)
    locals_ = [shard.shard(full, rank, n) for rank in range(n)]
    assert all(tuple(local.shape) == shard.local_shape(n) for local in locals_)
    assert torch.equal(shard.merge(locals_), full)
    if shard.dim is None:
        return
    # Every unit of every piece lies whole on one rank, and what is not of the full tensor is zero.
    assert sum(int((local != 0).sum()) for local in locals_) == full.numel()
    starts = [0, *accumulate(shard.pieces)]
    for rank in range(n):
        for start, span in zip(starts, shard.spans(rank, n), strict=False):
            assert (span.start - start) % shard.granularity == (span.stop - start) % shard.granularity == 0


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("size", "parts"), [(14, 2), (14, 1), (12, 3), (5, 5)])
def test_equal_pieces_of_single_rows_are_cut_as_ever(size: int, parts: int, n: int) -> None:
    """The cut that files in the world were made with: rank r's rows of each part, padded to a multiple of n."""
    part = size // parts
    share = padded_size(part, n) // n
    shard = Shard(shape=(size,), dim=0, pieces=(part,) * parts)
    full = torch.arange(1, size + 1)
    for rank in range(n):
        padded = torch.nn.functional.pad(full.view(parts, part), (0, share * n - part))
        expected = padded[:, rank * share : (rank + 1) * share].flatten()
        assert torch.equal(shard.shard(full, rank, n), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "shard",
    [
        Shard(shape=(11, 4), dim=0, pieces=(6, 1, 4), sources=("q", "k", "v")),
        Shard(shape=(12, 4), dim=0, sources=("a", "b", "c")),
        Shard(shape=(6, 8), dim=0, sources=("left", "right"), join=1),
        Shard(shape=(6, 8), dim=1, sources=("up", "down")),
        Shard(shape=(6, 8), sources=("up", "down")),
    ],
)
def test_several_tensors_of_a_file_make_one(shard: Shard, n: int) -> None:
    full = torch.randn(shard.shape)
    sources = shard.split_sources(full)
    assert [tuple(source.shape) for source in sources] == shard.source_shapes()

    def read(i: int, dim: int | None, start: int, stop: int) -> torch.Tensor:
        return sources[i] if dim is None else sources[i].narrow(dim, start, stop - start)

    for rank in range(n):
        rows = shard.read_spans(read, rank, n)
        assert torch.equal(shard.assemble(rows, rank, n), shard.shard(full, rank, n))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (4,), "dim": 1}, "got dim 1 of a tensor with 1 dimensions"),
        ({"shape": (4,), "dim": 0, "pieces": (2, 1)}, r"got pieces \[2, 1\] in units of 1"),
        ({"shape": (6,), "dim": 0, "pieces": (3, 3), "granularity": 2}, "must be multiples of the unit"),
        ({"shape": (6,), "dim": 0, "granularity": 0}, "must be multiples of the unit"),
        ({"shape": (6,), "pieces": (3, 3)}, "for a tensor that is not cut"),
        ({"shape": (7,), "dim": 0, "sources": ("a", "b")}, "2 sources cannot be of equal size"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard(**fields)
