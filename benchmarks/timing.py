"""How long a call takes: many samples, of which the median, the least and the 90th percentile are told.

On a GPU the time is the device's own, between two events. So that the host's part stays out of it, the device is
still busy when the first event reaches it: with emptying its cache in :func:`flushed`, with the run before in
:func:`replayed`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch

FLUSH_BYTES = 1 << 30
"""More than any L2."""

HOST_SAMPLES = 5
"""Launches of what is timed, of which the slowest counts, and flushes, of which the fastest does."""

WARM_UP_S = 0.2
"""How long a GPU works before the first sample: it then runs at its full clock."""

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Samples:
    """What was measured, once an element: seconds of a call, or a ratio."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def p90(self) -> float:
        """What nine samples in ten do not exceed."""
        return sorted(self.values)[-(-len(self.values) * 9 // 10) - 1]

    def scaled(self, factor: float) -> Samples:
        return Samples(tuple(value * factor for value in self.values))


def flushed(run: Run, samples: int) -> Samples:
    """Seconds of ``run`` on a GPU whose L2 holds none of its data.

    Before each sample a large buffer is written, then read: lines left dirty would be written back at the expense of
    what is timed. That is done as often as it takes for the device to fall behind the host: a slow host needs more
    than a millisecond to launch a layer.
    """
    buffer = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")

    def flush(passes: int = 1) -> None:
        for _ in range(passes):
            buffer.zero_()
            buffer.amax()

    _warm_up(run)
    host = max(_host_seconds(run) for _ in range(HOST_SAMPLES))
    passes = math.ceil(2 * host / _between_events(flush, HOST_SAMPLES, before=flush).least)
    return _between_events(run, samples, before=partial(flush, passes))


def replayed(run: Run, samples: int, agree: Callable[[bool], bool] = bool) -> Samples:
    """Seconds of ``run``, a captured graph that goes through more memory than the L2 holds, back to back.

    Args:
        agree: where ``run`` meets other ranks in it, what turns this rank's answer into one that is everybody's.
    """
    _warm_up(run, agree)
    run()
    return _between_events(run, samples, before=lambda: None)


def on_host(run: Run, samples: int) -> Samples:
    """Seconds of ``run`` on a CPU, after one run that is not counted."""
    run()
    seconds = []
    for _ in range(samples):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Samples(tuple(seconds))


def _warm_up(run: Run, agree: Callable[[bool], bool] = bool) -> None:
    """At least three runs and :data:`WARM_UP_S` seconds: compilation, handles and clocks are then out of the way."""
    end = time.perf_counter() + WARM_UP_S
    for runs in count(1):
        run()
        torch.cuda.synchronize()
        if agree(runs >= 3 and time.perf_counter() > end):
            return


def _host_seconds(run: Run) -> float:
    """How long the host takes to launch ``run`` on a device that has nothing else to do."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _between_events(run: Run, samples: int, before: Callable[[], None]) -> Samples:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)
    ]
    for start, end in events:
        before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Samples(tuple(start.elapsed_time(end) * 1e-3 for start, end in events))
