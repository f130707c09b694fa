"""Which block of the full tensor a rank holds: without padding, and independent of how many ranks there are."""

import pytest
import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as Cut

from tp_mamba.parallel.sharding import Shard
from tp_mamba.training.layout import data_dim, layout_of

D, H, R = 22, 12, 3


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_rank_holds_what_chunk_gives(n):
    # 22 over 4 ranks: 6, 6, 6 and 4 channels, with 2 of padding.
    full = torch.arange(2 * D * H).view(2 * D, H)
    shard = Shard(shape=(2 * D, H), dim=0, pieces=(D, D))
    parts = full.view(2, D, H).chunk(n, dim=1)
    for rank in range(n):
        layout = layout_of(shard, rank, n, 1)
        assert torch.equal(layout.view(shard.shard(full, rank, n)), parts[rank])
        assert layout.shape == (2, D, H)
        assert layout.placements == (Replicate(), Cut(1))


def test_a_rank_with_nothing_but_padding_holds_nothing():
    shard = Shard(shape=(5, 2), dim=0)
    sizes = [layout_of(shard, rank, 4, 1).view(torch.ones(2, 2)).shape[0] for rank in range(4)]
    assert sizes == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("shard", "M", "expected"),
    [
        (Shard(shape=(2 * D, H), dim=0, pieces=(D, D)), 3, (Cut(2), Cut(1))),
        (Shard(shape=(H, D), dim=1), 5, (Cut(0), Cut(1))),  # rows need not divide
        (Shard(shape=(H,)), 5, (Cut(0), Replicate())),
        (Shard(shape=(D, R), dim=0), 3, (Cut(1), Cut(0))),
        (Shard(shape=(D, R), dim=0), 2, (Replicate(), Cut(0))),  # R does not divide by 2
        (Shard(shape=(D, 1, 4), dim=0), 2, (Replicate(), Cut(0))),
        (Shard(shape=(D,), dim=0), 2, (Replicate(), Cut(0))),
        (Shard(shape=(D, 4), dim=0, wide=True), 2, (Replicate(), Cut(0))),
        (Shard(shape=(H,)), 1, (Replicate(), Replicate())),
    ],
)
def test_data_ranks_divide_another_dimension(shard, M, expected):
    assert layout_of(shard, 0, 2, M).placements == expected
    assert (data_dim(shard, 2, M) is None) == (expected[0] == Replicate())


@pytest.mark.parametrize(
    "shard", [Shard(shape=(9, 2), dim=0, pieces=(3, 6)), Shard(shape=(8, 2), dim=0, granularity=4)]
)
def test_what_no_dtensor_describes_is_refused(shard):
    with pytest.raises(ValueError, match="cannot be kept in a training checkpoint"):
        layout_of(shard, 0, 2, 1)
