"""The pool of ranks tells what failed, and where, as soon as it is known."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from rank_pool import JobError, RankPool

from tp_mamba.parallel.group import TensorParallel


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def reduce_rank(tp: TensorParallel) -> float:
    return float(tp.all_reduce_(torch.tensor([float(tp.rank + 1)])))


def fail_before_a_collective(tp: TensorParallel, victim: int, how: str) -> None:
    """Rank ``victim`` meets a fault, which the other one never hears of: it waits in a collective."""
    if tp.rank == victim:
        if how == "raise":
            raise ValueError("the cause")
        os.kill(os.getpid(), signal.SIGKILL)
    tp.all_reduce_(torch.ones(1))


def fail_everywhere(tp: TensorParallel) -> None:
    with tp.agreed():
        if tp.rank == 1:
            raise ValueError("the cause")


def wait_for_ever(tp: TensorParallel, waiter: int) -> None:
    if tp.rank == waiter:
        threading.Event().wait()


# An hour: only the failure itself can end the job in the time that a test has.
@pytest.mark.parametrize("victim", [0, 1])
def test_the_error_of_a_rank_that_others_wait_for(pool: RankPool, victim: int) -> None:
    with pytest.raises(JobError, match="the cause") as raised:
        pool.run(fail_before_a_collective, victim, "raise", timeout=3600)
    assert {rank: failure[:2] for rank, failure in raised.value.failures.items()} == {
        victim: ("ValueError", "the cause")
    }
    assert pool.run(reduce_rank) == [3.0, 3.0]  # of new workers


def test_a_rank_that_is_killed(pool: RankPool) -> None:
    with pytest.raises(JobError, match="rank 1 ended with exit code -9") as raised:
        pool.run(fail_before_a_collective, 1, "kill", timeout=3600)
    assert next(iter(raised.value.failures)) == 1


def test_an_error_of_all_ranks_keeps_the_pool(pool: RankPool) -> None:
    pool.run(reduce_rank)
    before = list(pool._processes)
    with pytest.raises(JobError) as raised:
        pool.run(fail_everywhere)
    assert [(rank, failure.error) for rank, failure in raised.value.failures.items()] == [
        (1, "ValueError"),
        (0, "RankFailedError"),
    ]
    assert pool.run(reduce_rank) == [3.0, 3.0]
    assert pool._processes == before


def test_a_rank_that_does_not_end(pool: RankPool) -> None:
    pool.run(reduce_rank)
    with pytest.raises(TimeoutError, match=r"^ranks \[(0, )?1\] of 2 did not finish within 1 s$"):
        pool.run(wait_for_ever, 1, timeout=1)
