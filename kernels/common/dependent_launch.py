"""Programmatic dependent launch (PDL): a kernel takes its place on the GPU before the previous kernel has ended.

In decode a kernel lasts two or three microseconds, a third of which is its launch and its first instructions; between
kernels the memory is idle. A kernel launched with :func:`early_start` is on the SMs as soon as all programs of the
previous kernel are, reads its static operands, and then waits for that kernel's end and for all that it wrote.

Every kernel that takes part calls :func:`wait_for_kernel_ahead` in every program, before it writes anything and before
it reads what such a kernel may have written: activations and states. The end of a kernel therefore says that all
kernels before it have ended too, however many of them started early. What may be read sooner is declared at each op:
:mod:`~tp_mamba.kernels.common.static_operands`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Once all programs of this kernel have called it, programs of the next kernel take the places that are free."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_kernel_ahead(PDL: tl.constexpr):
    """Return once the previous kernel has ended and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels can start early on ``device``: NVIDIA's Hopper and later."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def early_start(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that takes part: its constant ``PDL``, and Triton's ``launch_pdl``."""
    # A GPU that knows no early start knows no such option either.
    return {"PDL": True, "launch_pdl": True} if has_dependent_launch(device) else {"PDL": False}
