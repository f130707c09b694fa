"""Sums between GPUs, interpreted between processes that share memory: bits, order, marks, and ranks that are late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from all_reduce_testing import Schedule, in_rank_order, run_ranks, terms_of
from conv_norm_testing import run_on

from tp_mamba.kernels import all_reduce as op
from tp_mamba.kernels.all_reduce import Exchange, launch
from tp_mamba.kernels.all_reduce.layout import MAX_RANKS, WINDOW
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.split_dt_bc import split_dt_bc

SIZES = [2, 3, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
R, N, EPS = 24, 4, 1e-6


def same(actual: Any, expected: Any) -> None:
    """Equal to the bit, in signs of zeros too; NaN equals NaN."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.signbit()[~e.isnan()], e.signbit()[~e.isnan()])
        assert torch.equal(a[~e.isnan()], e[~e.isnan()])


def plain(exchange: Exchange, elements: int, dtype: torch.dtype, seed: int) -> None:
    """A sum out of place, in another dtype, and in place."""
    terms = terms_of(exchange.size, (elements,), dtype, seed)
    own, expected = terms[exchange.rank], in_rank_order(terms)
    same((op.all_reduce(own, exchange),), (expected,))
    same((op.all_reduce_(own, exchange),), (expected,))
    assert exchange.size == 2 or not torch.equal(expected, in_rank_order(terms[::-1])), "the order must show"


def norm(exchange: Exchange, T: int, H: int, dtype: torch.dtype, seed: int) -> None:
    """Both residual dtypes, with and without residual, weight and bias."""
    terms = terms_of(exchange.size, (T, H), dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    residual, weight = torch.randn(T, 2 * H, generator=generator)[:, :H], torch.randn(H, generator=generator)
    bias = torch.randn(H, generator=generator).to(dtype)
    total = in_rank_order(terms)
    for given, by, added, wide in (
        (residual, weight, None, True),
        (residual.to(dtype), None, bias, False),
        (None, weight.to(dtype), None, False),
    ):
        actual = op.all_reduce_add_rms_norm(
            terms[exchange.rank], given, by, EPS, exchange, bias=added, residual_in_fp32=wide
        )
        expected = total if added is None else total + added
        same(actual, add_rms_norm(expected, given, by, EPS, residual_in_fp32=wide))


def split(exchange: Exchange, T: int, slices: int, seed: int) -> None:
    """x_proj's sums whole and in slices, with norms and without."""
    shape = (slices, T, R + 2 * N)
    parts = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + r)) for r in range(exchange.size)
    ]
    terms = [op.add_slices(part) for part in parts]
    given = parts[exchange.rank] if slices > 1 else terms[exchange.rank]
    weights = {"dt_weight": torch.rand(R), "c_weight": torch.rand(N)} if seed % 2 else {}
    torch.manual_seed(seed)
    for options in ({"eps": EPS, **weights}, {"eps": None}):
        options["dt_dtype"] = torch.bfloat16
        same(
            op.all_reduce_split_dt_bc(given, R, N, exchange, **options),
            split_dt_bc(in_rank_order(terms), R, N, **options),
        )


@contextmanager
def small_blocks(size: int) -> Iterator[None]:
    """Blocks of few elements, and a crossover at two of them."""
    with mock.patch.multiple(
        launch, SMALL_BLOCK_BYTES=64, LARGE_BLOCK_BYTES=256, ONE_WAY_BYTES=256 * max(1, size - 2)
    ):
        launch.plain_plan.cache_clear()
        yield
    launch.plain_plan.cache_clear()


def each_form(exchange: Exchange, schedule: Schedule) -> list[int]:
    """Every form on both sides of its crossover, one after the other through the same memory."""
    with small_blocks(exchange.size):
        for seed, elements in enumerate((1, 128, 129, 1000)):
            plain(exchange, elements, DTYPES[seed % 3], seed)
        for seed, (T, H) in enumerate(((1, 96), (5, 33))):
            norm(exchange, T, H, DTYPES[seed % 2], seed)
        for seed, (T, slices) in enumerate(((1, 3), (9, 1))):
            split(exchange, T, slices, seed)
    return exchange.rounds.tolist()


def check_each_form(device: str, size: int) -> None:
    rounds = run_ranks(size, each_form)
    assert rounds == [rounds[0]] * size


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_in_rank_order(size: int) -> None:
    run_on("interpreter", check_each_form, size)


def few_rounds(exchange: Exchange, schedule: Schedule, calls: int, late: int | None) -> list[int]:
    """Messages of one to six rounds, one way and two, one program after the other and beside.

    Args:
        late: have one rank be late, at an access of each call that is counted on from this one; None: no rank.
    """
    size = exchange.size
    with small_blocks(size):
        for i in range(calls):
            terms = terms_of(size, ((13, 300, 64, 90)[i % 4],), torch.float32, i)
            if late is not None and i % size == exchange.rank:
                schedule.late_once(late + i)
            same((op.all_reduce(terms[exchange.rank], exchange),), (in_rank_order(terms),))
    return exchange.rounds.tolist()


def check_schedules(device: str, size: int, seeds: int, calls: int) -> None:
    for seed in range(seeds):
        rounds = run_ranks(
            size, few_rounds, calls, None, seed=seed, programs=1 + seed % 2, round_=seed % WINDOW
        )
        assert rounds == [rounds[0]] * size


@pytest.mark.parametrize(("size", "seeds", "calls"), [(2, 12, 8), (3, 6, 8), (4, 3, 8)])
def test_in_whatever_order_the_ranks_get_on(size: int, seeds: int, calls: int) -> None:
    """A rank gives way at three in ten accesses, stores come in two halves, and the counters wrap over and over."""
    run_on("interpreter", check_schedules, size, seeds, calls)


def check_late_ranks(device: str, size: int) -> None:
    for late in range(1, 40, 4):
        run_ranks(size, few_rounds, 4, late, programs=1)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_may_be_late_at_any_point(size: int) -> None:
    """Until no other rank can do anything more without it: they are then as far ahead as they can get."""
    run_on("interpreter", check_late_ranks, size)


def check_smaller_window(device: str) -> None:
    import triton.language as tl

    from tp_mamba.kernels.all_reduce import mail

    with mock.patch.object(mail, "WINDOW", tl.constexpr(2)):
        for late in range(1, 40, 4):
            run_ranks(2, few_rounds, 4, late, programs=1)


def test_a_window_of_two_is_too_small() -> None:
    with pytest.raises(AssertionError, match="sent onto what was not taken yet"):
        run_on("interpreter", check_smaller_window)


def special_values(exchange: Exchange, schedule: Schedule) -> None:
    """NaN of all bits, which is the mark; other NaN, infinities, and zeros of both signs."""
    for dtype in DTYPES:
        values = torch.tensor([0.0, -0.0, float("inf"), float("nan"), -1.0, 2.0**-130]).to(dtype)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        values = torch.cat([values, torch.tensor([-1, -2], dtype=bits).view(dtype)])
        terms = [values, torch.where(values == 0, values, 0.5).roll(3 * exchange.size - 6)]
        same((op.all_reduce(terms[exchange.rank], exchange),), (in_rank_order(terms),))


def check_special_values(device: str) -> None:
    run_ranks(2, special_values)


def test_any_value_travels() -> None:
    run_on("interpreter", check_special_values)


def ranks_that_disagree(exchange: Exchange, schedule: Schedule) -> None:
    if exchange.rank == 0:
        op.all_reduce(torch.ones(3), exchange)


def check_disagreement(device: str) -> None:
    run_ranks(2, ranks_that_disagree)


def test_a_rank_that_does_not_come_is_noticed() -> None:
    """By the test's own schedule: that it is no schedule under which everything seems to end well."""
    with pytest.raises(AssertionError, match=r"ranks \[0\] wait"):
        run_on("interpreter", check_disagreement)


def exchange(size: int = 2, programs: int = 4) -> Exchange:
    return Exchange(0, torch.zeros(size, dtype=torch.int64), torch.zeros(programs, dtype=torch.int32))


def test_refuses_wrong_input() -> None:
    for size in (1, MAX_RANKS + 1):
        with pytest.raises(ValueError, match=rf"rank 0 of {size} .* give 2 to 8 ranks"):
            exchange(size)
    with pytest.raises(ValueError, match="got 0 counters"):
        exchange(programs=0)
    with pytest.raises(ValueError, match=r"x has dtype torch.float64 .* use torch.distributed.all_reduce"):
        op.all_reduce(torch.zeros(3).double(), exchange())
    with pytest.raises(ValueError, match=r"out_dtype is torch.int32"):
        op.all_reduce(torch.zeros(3), exchange(), out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"strides \[1, 4\] but must be contiguous"):
        op.all_reduce_(torch.zeros(3, 4).t(), exchange())
    with pytest.raises(RuntimeError, match="no backward"):
        op.all_reduce(torch.zeros(3, requires_grad=True), exchange())
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"residual has shape \[2, 8\]"):
        op.all_reduce_add_rms_norm(x, x[:2], None, EPS, exchange())
    with pytest.raises(ValueError, match=r"bias has shape \[7\]"):
        op.all_reduce_add_rms_norm(x, None, None, EPS, exchange(), bias=torch.zeros(7))
    with pytest.raises(ValueError, match=r"bias has dtype torch\.bfloat16"):
        op.all_reduce_add_rms_norm(x, None, None, EPS, exchange(), bias=torch.zeros(8).bfloat16())
    with pytest.raises(ValueError, match=r"x has shape \[3, 8\] but must be \[T, R \+ 2 N\]"):
        op.all_reduce_split_dt_bc(x, 3, 2, exchange())


def test_fake_implementations_have_the_shapes_of_the_functions() -> None:
    x = torch.zeros(3, 8, device="meta")
    memory = (
        torch.zeros(4, dtype=torch.int32, device="meta"),
        torch.zeros(2, dtype=torch.int64, device="meta"),
        0,
    )
    ops = torch.ops.tp_mamba
    assert ops.all_reduce(x, *memory, torch.bfloat16).dtype == torch.bfloat16
    assert ops.all_reduce_(x, *memory) is None
    normed, residual = ops.all_reduce_add_rms_norm(x.half(), None, None, None, EPS, torch.float32, *memory)
    assert (normed.dtype, residual.dtype, residual.shape) == (torch.float16, torch.float32, (3, 8))
    dt, bc = ops.all_reduce_split_dt_bc(x[None], 4, 2, None, None, None, None, torch.bfloat16, *memory)
    assert (dt.shape, dt.dtype, bc.shape, bc.dtype) == ((3, 4), torch.bfloat16, (3, 4), torch.float32)
