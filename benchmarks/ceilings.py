"""What a GPU can do at most: of an H200 as recorded, of any other measured, in about a second."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192
SAMPLES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """The rates of one GPU, a second."""

    hardware: str
    bandwidth: float
    """Bytes, read plus written, of a large copy on the device."""
    step_bandwidth: float
    """Bytes to which a layer's decode step, and its state update, are held."""
    products: float
    """Floating-point operations of a large bfloat16 product."""
    exponentials: float

    def __str__(self) -> str:
        return (
            f"copies {self.bandwidth / 1e12:.2f} TB/s, products {self.products / 1e12:.0f} TFLOP/s, "
            f"exponentials {self.exponentials / 1e12:.2f} T/s"
        )


H200 = Ceilings(
    hardware="NVIDIA H200",
    bandwidth=4.30e12,
    step_bandwidth=4.27e12,
    products=715e12,
    exponentials=16 * 132 * 1.98e9,  # a clock and multiprocessor, multiprocessors, clock
)
"""The GPU of all goals and recorded times (:mod:`benchmarks.peers`). Measured once, torch 2.11.0+cu130."""


def ceilings_of(device: torch.device) -> Ceilings:
    """Those of ``device``, a GPU."""
    name = torch.cuda.get_device_name(device)
    return H200 if name == H200.hardware else measure(device)


def measure(device: torch.device) -> Ceilings:
    """The rates of ``device``, each the median of some runs behind as many that bring the clock up.

    These are bursts of some 50 ms; seven of them on one H100 gave 731 to 794 TFLOP/s of products.

    Raises:
        torch.OutOfMemoryError: less than 2 GiB of the GPU's memory are free.
    """
    with torch.cuda.device(device):
        bandwidth = _copied_bytes(device)
        return Ceilings(
            hardware=torch.cuda.get_device_name(device),
            bandwidth=bandwidth,
            step_bandwidth=bandwidth,
            products=_multiplied_flops(device),
            exponentials=_exponentials(device),
        )


def _copied_bytes(device: torch.device) -> float:
    source, target = torch.zeros(2, COPY_BYTES, dtype=torch.uint8, device=device)
    return 2 * COPY_BYTES / _seconds(partial(target.copy_, source))


def _multiplied_flops(device: torch.device) -> float:
    # Not zeros: those draw less power, and the clock would be higher than in use.
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device=device)
    return 2 * PRODUCT_SIZE**3 / _seconds(partial(torch.mm, a, b))


def _exponentials(device: torch.device) -> float:
    from benchmarks.exponentials_triton import launch

    return launch(device) / _seconds(partial(launch, device))


def _seconds(run: Callable[[], object]) -> float:
    """Seconds of one ``run``: the median of :data:`SAMPLES` back to back, after as many that are not counted."""
    stamps = [torch.cuda.Event(enable_timing=True) for _ in range(SAMPLES + 1)]
    for _ in range(SAMPLES):
        run()
    for stamp in stamps[:-1]:
        stamp.record()
        run()
    stamps[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(stamps)) * 1e-3
