"""Which implementation serves a tensor: Triton on a GPU, plain torch on a CPU."""

from __future__ import annotations

import os

import torch


def use_triton(x: torch.Tensor) -> bool:
    """True for CUDA tensors, and for CPU tensors under ``TRITON_INTERPRET=1``, which runs the same kernels."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
