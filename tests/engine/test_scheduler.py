"""What runs next, decided without a model, a device, or torch."""

import subprocess
import sys

import pytest

from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request, RequestState
from tp_mamba.engine.scheduler import Schedule, Scheduler


class Slots:
    """Slot numbers alone."""

    def __init__(self, size: int) -> None:
        self.free_slots = list(range(size))

    @property
    def num_free(self) -> int:
        return len(self.free_slots)

    def allocate(self) -> int:
        return self.free_slots.pop(0)

    def free(self, slot: int) -> None:
        self.free_slots.append(slot)


def requests(*lengths: int) -> list[Request]:
    return [Request(i, list(range(n)), SamplingParams(max_new_tokens=3)) for i, n in enumerate(lengths)]


def run(schedule: Schedule) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Do what a forward pass does to the requests; (decodes, chunks) by number."""
    chunks = [(c.request.index, c.start, c.length) for c in schedule.chunks]
    for chunk in schedule.chunks:
        chunk.request.taken += chunk.length
    return [request.index for request in schedule.decodes], chunks


def test_prompts_are_taken_in_by_order_of_arrival_within_the_budget() -> None:
    scheduler, slots = Scheduler(max_prefill_tokens=6), Slots(3)
    for request in requests(4, 9, 1, 2):
        scheduler.add(request)
    first = scheduler.schedule(slots)
    assert [request.index for request in first.admitted] == [0, 1]
    assert [request.index for request in first.sampling] == [0]
    assert run(first) == ([], [(0, 0, 4), (1, 0, 2)])
    assert run(scheduler.schedule(slots)) == ([0], [(1, 2, 6)])
    third = scheduler.schedule(slots)
    assert run(third) == ([0], [(1, 8, 1), (2, 0, 1)])
    assert [request.index for request in third.sampling] == [0, 1, 2]
    assert run(scheduler.schedule(slots)) == ([0, 1, 2], []), "no slot is free"
    assert scheduler.has_work


def test_a_removed_request_makes_room_for_the_next() -> None:
    scheduler, slots = Scheduler(max_prefill_tokens=6), Slots(1)
    first, second, third = requests(1, 1, 1)
    for request in (first, second, third):
        scheduler.add(request)
    run(scheduler.schedule(slots))
    assert second.slot is None
    scheduler.remove(second)
    scheduler.remove(first)
    assert first.slot is not None
    slots.free(first.slot)
    assert [request.index for request in scheduler.schedule(slots).admitted] == [2]
    scheduler.remove(third)
    assert not scheduler.has_work


def test_a_request_moves_forward_through_its_states() -> None:
    (request,), states = requests(2), []
    scheduler, slots = Scheduler(max_prefill_tokens=1), Slots(1)
    states.append(request.state)
    scheduler.add(request)
    for _ in range(2):
        run(scheduler.schedule(slots))
        states.append(request.state)
    while request.finish_reason is None:
        request.accept(7)
    states.append(request.state)
    assert states == list(RequestState)
    assert request.token_ids == [7, 7, 7]
    (failing,) = requests(1)
    assert failing.fail("why").error == "why"
    assert failing.state is RequestState.FINISHED


@pytest.mark.parametrize("module", ["scheduler", "request", "params"])
def test_scheduling_imports_no_torch(module: str) -> None:
    program = f"import sys, tp_mamba.engine.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], timeout=120).returncode == 0
