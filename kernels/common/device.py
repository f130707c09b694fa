"""What launches need to know of a device: its properties, read once, and whether it is the current one."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProperties:
    """Numbers of one GPU."""

    sm_count: int
    """Streaming multiprocessors (SMs)."""
    shared_bytes_per_sm: int
    """Shared memory of an SM, all programs on it together."""
    schedulers_per_sm: int = 4
    """Warp schedulers of an SM: four on every NVIDIA GPU since Maxwell; the driver does not tell."""


INTERPRETED = DeviceProperties(sm_count=132, shared_bytes_per_sm=228 * 1024)
"""An H100's numbers, for kernels that Triton's interpreter runs on a CPU: there a plan's choice shows in nothing."""


def device_properties(device: torch.device) -> DeviceProperties:
    """Properties of a CUDA ``device``; :data:`INTERPRETED` for a CPU."""
    if device.type != "cuda":
        return INTERPRETED
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _properties(index: int) -> DeviceProperties:
    of_gpu = torch.cuda.get_device_properties(index)
    return DeviceProperties(of_gpu.multi_processor_count, of_gpu.shared_memory_per_multiprocessor)


_AS_IT_IS = nullcontext()


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which ``x``'s device is the current one, as a launch wants it; free where it is already."""
    index = x.get_device()  # -1 for a CPU
    if index >= 0 and index != torch.cuda.current_device():
        return torch.cuda.device(index)
    return _AS_IT_IS
