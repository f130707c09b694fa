"""When steps are captured, and what happens where they cannot be; without a GPU."""

import warnings
from collections.abc import Callable

import pytest
import torch

from tp_mamba.engine.graphs import CaptureWarning, StepGraphs
from tp_mamba.engine.ladder import Ladder, Rung

DECODE, SMALL, LARGE = Rung(2, 2, decodes=True), Rung(16, 1, decodes=False), Rung(58, 8, decodes=False)


class Recorder:
    """Runs nothing, captures by remembering, and writes down what happens."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.log: list[tuple[str, Rung]] = []
        self.rung: Rung | None = None
        self._left = fails_at

    def run(self, rung: Rung) -> None:
        self.rung = rung
        self.log.append(("run", rung))

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        run()
        _, rung = self.log.pop()
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore of it")
        self.log.append(("capture", rung))
        return lambda: self.log.append(("replay", rung))


def graphs(recorder: Recorder) -> StepGraphs:
    return StepGraphs(Ladder(8, 50), recorder.capture)


def test_a_step_is_captured_when_its_rung_is_used_again() -> None:
    recorder = Recorder()
    made = graphs(recorder)
    for _ in range(3):
        made(DECODE, recorder.run)
    assert recorder.log == [("run", DECODE), ("capture", DECODE), ("replay", DECODE), ("replay", DECODE)]
    assert made.report.graphs == 1
    assert not made.needs_room(DECODE)


def test_the_largest_mixed_step_is_captured_before_the_others() -> None:
    recorder = Recorder()
    made = graphs(recorder)
    assert made.ladder.largest == LARGE
    assert not made.needs_room(SMALL), "it may not come again"
    made(SMALL, recorder.run)
    assert made.needs_room(SMALL)
    made.reserve(recorder.run)
    made(SMALL, recorder.run)
    assert [what for what in recorder.log if what[0] == "capture"] == [("capture", LARGE), ("capture", SMALL)]
    assert not made.needs_room(SMALL)
    assert made.report.graphs == 2


def test_where_capturing_fails_steps_go_on_as_they_are_and_one_warning_says_why() -> None:
    recorder = Recorder(fails_at=1)
    made = graphs(recorder)
    made(DECODE, recorder.run)
    made(DECODE, recorder.run)
    made(SMALL, recorder.run)
    with pytest.warns(CaptureWarning) as warned:
        made(SMALL, recorder.run)
    (one,) = warned
    assert str(one.message) == (
        "a step of 16 tokens could not be captured (OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.), "
        "so steps run eagerly from here on, which is slower: leave more memory free, or pass eager=True"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(SMALL, recorder.run)
        made(LARGE, recorder.run)
        made(LARGE, recorder.run)
        made(DECODE, recorder.run)
    assert recorder.log[3:] == [("run", SMALL)] * 3 + [("run", LARGE)] * 2 + [("replay", DECODE)]
    assert not made.needs_room(SMALL)


def test_without_capture_every_step_runs() -> None:
    recorder = Recorder()
    made = StepGraphs(Ladder(8, 50), None)
    for _ in range(3):
        assert not made.needs_room(SMALL)
        made(SMALL, recorder.run)
    assert recorder.log == [("run", SMALL)] * 3
