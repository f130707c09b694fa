"""Ranks that were given different things, and threads that want one group at a time, are told so."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.turns import hold


def _compare(tp: TensorParallel, given: list[dict[str, Any]]) -> str:
    try:
        tp.same_everywhere(**given[tp.rank])
    except ValueError as error:
        return str(error)
    return "same"


def test_equal_values_pass(ranks) -> None:
    values = {"seed": 3, "prompt 0": [1, 2], "stop": ("a\n",)}
    assert ranks(1).run(_compare, [values]) == ["same"]
    assert ranks(3).run(_compare, [values] * 3) == ["same"] * 3


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"seed": 3, "tp": 2}, "tp differs between the ranks, rank 0 was given 1 and rank 2 2: give every"),
        ({"seed": 4, "tp": 1}, "seed differs between the ranks, rank 0 was given 3 and rank 2 4: give every"),
        ({"seed": 3}, "tp differs between the ranks, rank 0 was given 1 and rank 2 nothing: give every"),
        ({"seed": "3", "tp": 1}, "seed differs between the ranks, rank 0 was given 3 and rank 2 '3': give"),
    ],
)
def test_every_rank_names_what_differs_and_where(ranks, last: dict[str, Any], message: str) -> None:
    common = {"seed": 3, "tp": 1}
    told = ranks(3).run(_compare, [common, common, last])
    assert told[0].startswith(message)
    assert told == told[:1] * 3


def test_large_values_are_compared_whole_and_told_in_short(ranks) -> None:
    one, other = list(range(5000)), list(range(5000))
    other[2500] = 0
    told = ranks(2).run(_compare, [{"prompt 0": one}, {"prompt 0": other}])
    assert told[0].startswith("prompt 0 differs between the ranks, rank 0 was given [0, 1, 2, ")
    assert len(told[0]) < 400


def _two_threads(tp: TensorParallel) -> list[str]:
    told = []

    def other_thread(end: str) -> None:
        try:
            hold(tp, "generating")()
        except ValueError as error:
            end = str(error)
        told.append(end)

    def ask() -> None:
        thread = threading.Thread(target=other_thread, args=("taken",))
        thread.start()
        thread.join()

    first = hold(tp, "generating")
    second = hold(tp, "generating")  # this thread may have it twice
    ask()
    first()
    ask()
    second()
    ask()
    return told


def test_a_group_is_one_threads_at_a_time(ranks) -> None:
    for refused, still_refused, taken in ranks(2).run(_two_threads):
        assert refused.startswith("generating over a process group that another thread is generating over: ")
        assert (still_refused, taken) == (refused, "taken")
    assert ranks(1).run(_two_threads) == [["taken"] * 3], "one rank without a group has nobody to confuse"
