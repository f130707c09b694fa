"""Rows of packed documents: every token once, nothing across a border, the same order from any position."""

from itertools import pairwise

import numpy as np
import pytest
from training_samples import documents

from tp_mamba.training.packing import DataOrder, count_tokens, divide, lay_rows, pack
from tp_mamba.training.tokens import Tokens


def random_bounds(rng):
    return np.concatenate([[0], np.cumsum(rng.integers(0, 30, rng.integers(1, 8)))]).astype(np.int64)


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_token_that_has_a_next_one_is_read_once(shuffled):
    rng = np.random.default_rng(0)
    for trial in range(200):
        bounds, length = random_bounds(rng), int(rng.integers(1, 9))
        rows = lay_rows(bounds, length, np.random.default_rng(trial) if shuffled else None)
        read = []
        for i in range(len(rows)):
            starts, lengths = rows.row(i)
            assert lengths.min() > 0
            assert lengths.sum() <= length
            for start, size in zip(starts, lengths, strict=True):
                document = np.searchsorted(bounds, start, side="right") - 1
                assert start + size < bounds[document + 1]  # its last target is of the same document
                read += range(start, start + size)
        expected = [token for a, b in pairwise(bounds) for token in range(a, b - 1)]
        assert sorted(read) == expected
        assert sum(rows.row(i)[1].sum() < length for i in range(len(rows))) <= 1  # the last that shared rows


def test_long_documents_are_cut_at_other_places_in_each_epoch():
    tokens = documents((100,))
    order = DataOrder(tokens, 16, seed=0)
    first, second = ({int(s) for starts, _ in order.take(7) for s in starts} for _ in range(2))
    assert first != second
    again = DataOrder(tokens, 16, seed=1)
    assert {int(s) for starts, _ in again.take(7) for s in starts} != first


def test_an_order_goes_on_from_any_position():
    tokens = documents((3, 40, 9, 100))
    whole = DataOrder(tokens, 8, seed=5).take(70)  # several epochs
    for start in range(0, 60, 7):
        order = DataOrder(tokens, 8, seed=5)
        order.take(start)
        resumed = DataOrder(tokens, 8, seed=5, position=order.position)
        for got, expected in zip(resumed.take(10), whole[start : start + 10], strict=True):
            assert np.array_equal(got[0], expected[0])
            assert np.array_equal(got[1], expected[1])


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 12])
def test_parts_are_the_whole(parts):
    rows = DataOrder(documents((50, 3, 17)), 4, seed=0).take(12)
    divided = [divide(rows, part, parts) for part in range(parts)]
    assert [row for part in divided for row in part] == rows
    assert len({len(part) for part in divided}) == 1
    assert sum(map(count_tokens, divided)) == count_tokens(rows)


def test_targets_are_the_next_tokens():
    ids = np.arange(60, dtype=np.uint16)
    tokens = Tokens(ids, np.array([0, 20, 21, 60]))
    batch = pack(tokens, DataOrder(tokens, 8, seed=0).take(7))
    assert np.array_equal(batch.targets, batch.ids + 1)
    assert not set(batch.ids.tolist()) & {19, 20, 59}
    assert sum(batch.lengths) == len(batch.ids)


def test_data_without_a_next_token_is_refused():
    with pytest.raises(ValueError, match="no document of two tokens or more"):
        DataOrder(documents((1, 1)), 8, seed=0)


@pytest.mark.parametrize("sizes", [(100,), (30, 40, 30), (90, 10), (89, 2, 9)])
def test_the_last_tenth_is_split_off(sizes):
    tokens = documents(sizes)
    train, valid = tokens.split(0.1)
    assert (len(train), len(valid)) == (90, 10)
    assert set(train.bounds) | set(valid.bounds) == {*tokens.bounds.tolist(), 90}
    assert train.bounds[-1] == valid.bounds[0] == 90
