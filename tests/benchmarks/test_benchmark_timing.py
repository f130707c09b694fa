"""How the benchmarks take times, and how they compare outputs before they do."""

from __future__ import annotations

import math
import time
from functools import partial

import pytest
import torch

from benchmarks import (
    chain,
    checking,
    timing,
)
from benchmarks.checking import Error
from benchmarks.timing import Samples


def test_samples() -> None:
    samples = Samples((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (samples.median, samples.least, samples.p90) == (3.0, 1.0, 5.0)
    assert Samples(tuple(map(float, range(1, 101)))).p90 == 90
    assert samples.scaled(1e3).values == (5e3, 1e3, 2e3, 4e3, 3e3)


def test_host_time_leaves_the_first_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs = [0.0], iter([100.0, 1.0, 2.0, 3.0])

    def call() -> None:
        now[0] += next(costs)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.on_host(call, 3).values == (1.0, 2.0, 3.0)


def test_ranks_warm_up_until_all_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    runs, answers = [], []

    def run() -> None:
        runs.append(1)
        now[0] += 10.0  # this clock is done at once

    def another_rank_is_slower(mine: bool) -> bool:
        answers.append(mine)
        return mine and len(answers) == 7

    timing._warm_up(run, another_rank_is_slower)
    assert len(runs) == 7
    assert answers == [False, False, True, True, True, True, True]
    timing._warm_up(run)
    assert len(runs) == 10


def test_a_chain_is_longer_than_the_cache() -> None:
    for count in (1_000_000, 3_000_000, 10**9):
        assert chain.links(count) * count >= chain.TRAFFIC
    assert chain.links(10**9) == chain.LEAST
    assert chain.links(1) == chain.MOST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compare_allows_rounding_and_no_more(dtype: torch.dtype) -> None:
    exact = torch.randn(50, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = exact.to(dtype)
    assert checking.compare("x", rounded, exact).ok
    one_element = rounded.clone()
    one_element[3, 4] += 0.1
    swapped = rounded.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    off = (exact * (1 + 4 * torch.finfo(dtype).eps + 1e-4)).to(dtype)
    holed = rounded.clone()
    holed[0, 0] = float("nan")
    for wrong in (one_element, swapped, off, holed, rounded * float("inf")):
        assert not checking.compare("x", wrong, exact).ok
    with pytest.raises(ValueError, match=r"x has shape \[40, 50\] but its reference has \[50, 40\]"):
        checking.compare("x", rounded.t(), exact)


def test_compare_with_a_reference_of_the_same_dtype() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = 1e-3 * torch.randn(1000, generator=torch.Generator().manual_seed(2))
    reference = exact.float() + noise
    assert checking.compare("x", exact.float() + 1.5 * noise.flip(0), exact, rounded=reference).ok
    assert not checking.compare("x", exact.float() + 3 * noise.flip(0), exact, rounded=reference).ok


def test_the_worst_error_of_each_output_is_told() -> None:
    small, large = Error("out", 1.0, 3.0, 0.0, 1.0), Error("out", 2.0, 3.0, 0.0, 1.0)
    wrong, nothing = Error("out", 0.5, 3.0, 9.0, 1.0), Error("out", math.nan, 3.0, 0.0, 1.0)
    other = Error("state", 0.0, 1.0, 0.0, 1.0)
    assert set(checking.worst_of_each([large, other, small])) == {large, other}
    assert checking.worst_of_each([wrong, large]) == [wrong]
    assert checking.worst_of_each([nothing, large, small]) == [nothing]


@pytest.mark.gpu
def test_device_times() -> None:
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 8192))
    for clock in (timing.flushed, timing.replayed):
        short, lengthy = (clock(partial(torch.mm, x, x), 5) for x in (small, large))
        assert len(short.values) == 5
        assert 0 < short.median < lengthy.least


@pytest.mark.gpu
def test_a_slow_host_does_not_show() -> None:
    x = torch.randn(256, 256, device="cuda")

    def run() -> None:
        torch.mm(x, x)
        time.sleep(3e-3)
        torch.mm(x, x)

    assert timing.flushed(run, 5).median < 1e-3


@pytest.mark.gpu
def test_a_chain_is_replayed() -> None:
    x = torch.ones(4, device="cuda")
    links = chain.Chain([lambda: x * 2, lambda: x + 1], torch.device("cuda"))
    first, second = links.outputs
    x.fill_(5)
    links()
    assert links.outputs[0] is first
    assert first.tolist() == [10.0] * 4
    assert second.tolist() == [6.0] * 4
