"""Which implementation serves a call: Triton or plain torch, and with or without torch's dispatcher in between."""

from __future__ import annotations

import os

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def use_triton(x: torch.Tensor) -> bool:
    """True for CUDA tensors, and for CPU tensors under ``TRITON_INTERPRET=1``, which runs the same kernels.

    Never for float64: the kernels compute in float32.
    """
    return x.dtype != torch.float64 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})


def calls_directly(*tensors: torch.Tensor | None) -> bool:
    """Whether an op's implementation can be called as a function, which saves a quarter of the host's time for it.

    Not where somebody is to see the registered op: autograd, a compiler, a tracer, a dispatch mode, a subclass of
    Tensor; nor for tensors without data, which the op's fake implementation serves. The first of ``tensors`` is not
    None.
    """
    if tensors[0].is_meta:  # type: ignore[union-attr]
        return False
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch.jit.is_tracing():
        return False
    grad = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110 - a generator would cost as much as all the rest
        if type(x) not in _PLAIN or (grad and x is not None and x.requires_grad):
            return False
    return True
