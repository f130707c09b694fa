"""Which implementation serves a tensor: Triton on a GPU, plain torch on a CPU and for float64."""

from __future__ import annotations

import os

import torch


def use_triton(x: torch.Tensor) -> bool:
    """True for CUDA tensors, and for CPU tensors under ``TRITON_INTERPRET=1``, which runs the same kernels.

    Never for float64: the kernels compute in float32.
    """
    return x.dtype != torch.float64 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
