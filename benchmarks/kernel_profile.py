"""The kernels of one call, with their times from torch's profiler and the bytes of what they were given."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tp_mamba.launch.console import table


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator that ran kernels."""

    operator: str
    kernels: tuple[str, ...]
    microseconds: float
    bytes: int | None
    """Bytes of all its tensors, in and out, each counted once; None if the operator was not seen."""


class Traffic(TorchDispatchMode):
    """Notes every operator with the bytes of its tensors, a view's as far as it reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = {
            (t.data_ptr(), t.shape, t.stride()): t.numel() * t.element_size()
            for t in tree_leaves((args, kwargs, result))
            if isinstance(t, torch.Tensor)
        }
        self.seen.append((func._schema.name, sum(tensors.values())))
        return result


def join(
    timed: Sequence[tuple[str, tuple[str, ...], float]], seen: Sequence[tuple[str, int]]
) -> list[Launch]:
    """Operators with kernels and times, and operators with bytes, put together by name and order."""
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for operator, count in seen:
        waiting[operator].append(count)
    return [
        Launch(operator, kernels, us, waiting[operator].popleft() if waiting[operator] else None)
        for operator, kernels, us in timed
    ]


def launches(call: Callable[[], object]) -> tuple[list[Launch], float]:
    """What one ``call`` runs on the GPU, and the microseconds of kernels that no operator owns.

    Three calls before it are not counted: the first compiles, the second is watched for its tensors.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    with Traffic() as traffic:
        call()
    torch.cuda.synchronize()
    for _ in range(2):  # the first profile of a process also starts the tracing, which shows in it
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    timed = [
        (event.name, tuple(kernel.name for kernel in event.kernels), sum(k.duration for k in event.kernels))
        for event in events
        if event.kernels and "::" in event.name  # the profiler has events of its own
    ]
    on_device = sum(e.time_range.elapsed_us() for e in events if e.device_type == DeviceType.CUDA)
    found = join(timed, traffic.seen)
    return found, on_device - sum(launch.microseconds for launch in found)


def show(title: str, call: Callable[[], object]) -> None:
    """Print the kernels of ``call`` in the order they run."""
    found, others = launches(call)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    console.print(title)
    console.print(as_table(found, others))


def as_table(found: Sequence[Launch], others: float) -> Table:
    """A line an operator, then their sum; ``others`` are microseconds that belong to none of them."""
    rows = [
        [
            launch.operator,
            " + ".join(name[:60] for name in launch.kernels),
            f"{launch.microseconds:.1f}",
            "" if launch.bytes is None else f"{launch.bytes / 1e6:.1f}",
            "" if not launch.bytes else f"{launch.bytes / launch.microseconds / 1e6:.2f}",
        ]
        for launch in found
    ]
    if others > 0.5:
        rows.append(["no operator", "", f"{others:.1f}", "", ""])
    kernels = sum(len(launch.kernels) for launch in found)
    total = sum(launch.microseconds for launch in found) + max(others, 0.0)
    moved = sum(launch.bytes or 0 for launch in found) / 1e6
    rows.append(["total", f"{kernels} kernels", f"{total:.1f}", f"{moved:.1f}", ""])
    return table(["operator", "kernels", "us", "MB", "TB/s"], rows, left=2)
