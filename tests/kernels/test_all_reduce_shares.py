"""Large sums by shares of rows, interpreted between ranks that share memory: bits, reuse of memory, late ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from all_reduce_testing import Schedule, in_rank_order, run_ranks, terms_of
from conv_norm_testing import run_on

from tp_mamba.kernels.all_reduce import shares as op
from tp_mamba.kernels.all_reduce.shares import Shares
from tp_mamba.kernels.rms_norm import add_rms_norm

SIZES = [2, 3, 4, 8]
DTYPES = [torch.float32, torch.bfloat16]
H, EPS = 12, 1e-6


def send(schedule: Schedule, shares: Shares, term: torch.Tensor) -> torch.Tensor:
    """Begin the sum of ``term [T, H]``; this rank's rows of it. A rank may be late before each copy."""
    T = len(term)
    for step in range(1, shares.size):
        rank = (shares.rank + step) % shares.size
        schedule.access()
        op.send_terms(term[shares.rows_of(rank, T)], rank, T, shares)
        schedule.stored()
    op.tell_terms_sent(shares)
    op.wait_for_terms(shares)
    return term[shares.rows_of(shares.rank, T)]


def send_back(schedule: Schedule, shares: Shares, rows: torch.Tensor) -> None:
    """End a sum: all rows at every rank."""
    for step in range(1, shares.size):
        schedule.access()
        op.send_rows(rows, (shares.rank + step) % shares.size, shares)
        schedule.stored()
    op.tell_rows_sent(shares)
    op.wait_for_rows(shares)


def one_sum(shares: Shares, schedule: Schedule, T: int, seed: int) -> None:
    """A sum with norm, or without, against the same of whole terms on one rank."""
    rank, dtype = shares.rank, DTYPES[seed % 2]
    terms = terms_of(shares.size, (T, H), dtype, seed)
    mine, total = shares.rows_of(rank, T), in_rank_order(terms)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(H, generator=generator).to(dtype) if seed % 3 else None
    expected = total if bias is None else total + bias
    own = send(schedule, shares, terms[rank])
    if seed % 4 == 3:
        found = op.add_shares(own, T, shares, bias=bias)
        send_back(schedule, shares, found)
    else:
        residual = torch.randn(T, H, generator=generator) if seed % 4 else None
        weight = torch.randn(H, generator=generator)
        wide = torch.float32 if seed % 4 == 1 else dtype
        found, new_residual = op.add_shares_rms_norm(
            own, None if residual is None else residual[mine], weight, EPS, T, shares,
            bias=bias, residual_dtype=wide,
        )  # fmt: skip
        send_back(schedule, shares, found)
        expected, kept = add_rms_norm(expected, residual, weight, EPS, residual_in_fp32=wide == torch.float32)
        assert torch.equal(new_residual[: len(own)], kept[mine])
        assert new_residual.shape == (-(-T // shares.size), H)
        assert not new_residual[len(own) :].any()
    schedule.access()  # the others may be a sum ahead: these rows still stand
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def sums(shares: Shares, schedule: Schedule, count: int, late: int | None) -> list[int]:
    """Sums of changing sizes, one after the other through the same memory.

    Args:
        late: have one rank be late, at an access of each sum that is counted on from this one; None: no rank.
    """
    for i in range(count):
        if late is not None and i % shares.size == shares.rank:
            schedule.late_once(late + i)
        one_sum(shares, schedule, (3, 16, 9, 7, 1)[i % 5] + shares.size % 3, seed=i)
    return [*shares.terms_sent.rounds.tolist(), *shares.rows_sent.rounds.tolist()]


ROOM = 18 * H * 4
LATEST = {2: 50, 3: 70}
"""By ranks: accesses to memory of each in a sum, and some."""


def check_bits(device: str, size: int) -> None:
    assert run_ranks(size, sums, 4, None, room=ROOM) == [[0, 0]] * size


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_in_rank_order(size: int) -> None:
    run_on("interpreter", check_bits, size)


def check_schedules(device: str, size: int, seeds: int) -> None:
    for seed in range(seeds):
        run_ranks(size, sums, 5, None, seed=seed, round_=seed % 4, room=ROOM)


@pytest.mark.parametrize(("size", "seeds"), [(2, 5), (3, 3)])
def test_in_whatever_order_the_ranks_get_on(size: int, seeds: int) -> None:
    run_on("interpreter", check_schedules, size, seeds)


def check_late_ranks(device: str, size: int) -> None:
    for late in range(1, LATEST[size], 2 if size == 2 else 8):
        run_ranks(size, sums, 2, late, room=ROOM)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_may_be_late_at_any_point(size: int) -> None:
    """Until no other rank can do anything more without it: they are then as far ahead as they can get."""
    run_on("interpreter", check_late_ranks, size)


def check_without(device: str, name: str) -> None:
    with mock.patch.object(op, name, return_value=None):
        for late in range(1, LATEST[2], 2):
            run_ranks(2, sums, 2, late, room=ROOM)


@pytest.mark.parametrize("name", ["wait_for_terms", "wait_for_rows"])
def test_each_of_the_waits_is_needed(name: str) -> None:
    with pytest.raises(AssertionError):
        run_on("interpreter", check_without, name)


def test_what_fits() -> None:
    memory = torch.empty(4096, dtype=torch.uint8)
    words = [mock.Mock(rank=1), mock.Mock(rank=1)]
    shares = Shares((memory,) * 3, (memory,) * 3, *words)
    assert shares.takes(64, 32, torch.bfloat16)
    assert not shares.takes(65, 32, torch.bfloat16), "more rows than there is room for"
    assert not shares.takes(64, 32, torch.float32)
    small = Shares((memory[:1024],) * 3, (memory,) * 3, *words)
    assert not small.takes(64, 32, torch.bfloat16), "more terms"
    assert [shares.rows_of(rank, 7) for rank in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [shares.rows_of(rank, 1) for rank in range(3)] == [slice(0, 1), slice(1, 1), slice(1, 1)]
