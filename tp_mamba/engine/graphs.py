"""Captured steps: one CUDA graph a rung of the ladder, replayed for every step that fits it.

Launching a step's kernels one by one takes a host ten times as long as a GPU takes to run them. A graph is launched at
once. It is captured when its rung is used a second time: the first step of a rung runs eagerly, at the same capacity,
and so compiles and chooses whatever there is to compile and choose. Capturing then costs little more than the eager
step that it stands for, and nothing is captured that is not used. All ranks run the same steps, so they capture in the
same order.

All graphs share one pool of memory. The largest mixed step is captured before any other mixed one, so that the others
find room in what it leaves.

Where capturing fails, for want of memory or because a layer does something that cannot be captured, steps run eagerly
from then on, and a warning says why. They keep their capacities, so ranks that replay and ranks that do not still meet
in the same collectives.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from tp_mamba.engine.ladder import Ladder, Rung

Capture = Callable[[Callable[[], object]], Callable[[], None]]
"""Takes what runs a step; what it returns runs it again."""


class CaptureWarning(RuntimeWarning):
    """Steps could not be captured and run eagerly."""


@dataclass(slots=True)
class CaptureReport:
    """What capturing has cost so far."""

    graphs: int = 0
    seconds: float = 0.0


class StepGraphs:
    """Runs steps that are padded to a rung.

    Attributes:
        ladder: the rungs.
        report: what capturing has cost.
    """

    def __init__(self, ladder: Ladder, capture: Capture | None) -> None:
        """Without ``capture`` every step runs eagerly."""
        self.ladder, self.report = ladder, CaptureReport()
        self._capture = capture
        self._warm: set[Rung] = set()
        self._replays: dict[Rung, Callable[[], None]] = {}

    def needs_room(self, rung: Rung) -> bool:
        """Whether the largest step is to be captured first, as a step of padding alone, before this one's inputs
        are laid out."""
        largest = self.ladder.largest
        due = self._capture is not None and not rung.decodes and rung in self._warm
        return due and largest not in self._replays

    def reserve(self, run: Callable[[Rung], object]) -> None:
        """Capture the largest step; the buffers hold one of padding alone."""
        self(self.ladder.largest, run)
        self(self.ladder.largest, run)

    def __call__(self, rung: Rung, run: Callable[[Rung], object]) -> None:
        """Run the step that lies in the buffers, padded to ``rung``: by ``run``, or as it was captured."""
        replay = self._replays.get(rung)
        if replay is None and rung in self._warm:
            replay = self._captured(rung, run)
        if replay is None:
            run(rung)
            self._warm.add(rung)
        else:
            replay()

    def _captured(self, rung: Rung, run: Callable[[Rung], object]) -> Callable[[], None] | None:
        if self._capture is None:
            return None
        began = time.perf_counter()
        try:
            replay = self._capture(functools.partial(run, rung))
        except RuntimeError as failure:  # torch.OutOfMemoryError is one
            self._capture = None
            reason = str(failure).partition("\n")[0]
            warnings.warn(
                f"a step of {rung.tokens} tokens could not be captured ({type(failure).__name__}: {reason}), so steps "
                "run eagerly from here on, which is slower: leave more memory free, or pass eager=True",
                CaptureWarning,
                stacklevel=2,
            )
            return None
        self._replays[rung] = replay
        self.report.graphs += 1
        self.report.seconds += time.perf_counter() - began
        return replay


class CudaCapture:
    """Captures on ``device``, all graphs in one pool of memory, which lives as long as any of them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], object]) -> Callable[[], None]:
        """A graph of what ``run`` launches; nothing of it is computed now.

        Raises:
            RuntimeError: it cannot be captured, or there is too little memory.
        """
        graph = torch.cuda.CUDAGraph()
        with _one_at_a_time, _without_collection(), torch.cuda.stream(self._stream):
            # Other threads, NCCL's watchdog among them, may go on with their own work.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


_one_at_a_time = threading.Lock()
"""Held while something is captured: engines of several threads share the stream."""


@contextmanager
def _without_collection() -> Iterator[None]:
    """Inside, Python collects no garbage: what it frees might belong to the device, which must not be asked now."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that everything is captured on, with the library's workspace in ordinary memory.

    torch keeps one workspace for each stream. Made during a capture it would lie in that graph's pool.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.bfloat16):
            square = torch.zeros(16, 16, dtype=dtype, device=device)
            torch.addmm(square[0], square, square)
    stream.synchronize()
    return stream
