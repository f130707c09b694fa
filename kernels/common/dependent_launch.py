"""Programmatic dependent launch: a kernel takes its place on the GPU before the kernel ahead of it has ended.

In decode a kernel lasts two or three microseconds, a third of which is its launch and its first instructions; between
kernels the memory is idle. A kernel launched with :func:`early_start` is on the multiprocessors as soon as all programs
of the kernel ahead are, and then waits for that kernel's end and for all that it wrote. Meanwhile its weights are on
their way.

Every kernel that takes part calls :func:`wait_for_kernel_ahead` in every program, before it writes anything and before
it reads what such a kernel may have written: activations and states. The end of a kernel therefore says that all
kernels before it have ended too, however many of them started early. Weights and slots it may read sooner: they are
older than any kernel that lets the next start, since what writes them (a loader, an optimizer, PyTorch's operators)
does not.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """From when all programs of this kernel have called it, those of the next one take free places."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_kernel_ahead(PDL: tl.constexpr):
    """Return once the kernel ahead has ended and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels can start early on ``device``: on NVIDIA's Hopper and later."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def early_start(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that takes part: its constant ``PDL``, and Triton's ``launch_pdl``."""
    # A GPU that knows no early start knows no such option either.
    return {"PDL": True, "launch_pdl": True} if has_dependent_launch(device) else {"PDL": False}
