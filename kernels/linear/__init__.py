"""``x @ weight.T + bias`` by the routine that serves the shape best.

On a GPU that is the library's product, and for few rows :func:`skinny_linear` where that has been measured to be
faster.

On a CPU it is the library's product too, but for one or two rows of float32 (a decoded token): MKL runs those on one
thread, at half of what that thread could read. A batch of products ``block @ column``, one block of the weight's rows
each, runs on all threads. Nothing is repacked, so no weight is held twice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tp_mamba.kernels.linear.skinny import prefers_skinny, skinny_linear

_MOST_BLOCKS = 16
_LARGE = 100_000
"""Elements of a weight from which this pays: less is read by one thread before others have started."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``: the same arguments, results up to rounding, gradients and errors.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]``, contiguous.
    """
    if x.is_cuda and bias is None and _is_skinny(x, weight):
        return skinny_linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    if not _is_one_or_two_rows(x, weight, bias):
        return F.linear(x, weight, bias)
    out_size, in_size = weight.shape
    blocks = math.gcd(out_size, _MOST_BLOCKS)
    if x.dim() == 2:
        y = _by_blocks(x, weight, blocks)
    else:
        y = _by_blocks(x.reshape(-1, in_size), weight, blocks).view(*x.shape[:-1], out_size)
    return y if bias is None else y.add_(bias)


def _is_skinny(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this is a well-formed product of few rows for our own kernel, that no gradient passes through."""
    if x.dtype != weight.dtype or weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    (N, K), plain = weight.shape, weight.stride(1) == 1 and x.device == weight.device
    return plain and not tracked and K > 0 and prefers_skinny(x.numel() // K, N, K, x.dtype)


def _is_one_or_two_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether this is a well-formed float32 product of one or two rows on a CPU, not tiny, without a gradient."""
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not (x.is_cpu and weight.is_cpu):
        return False
    tracked = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if tracked and torch.is_grad_enabled():
        return False
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    if weight.numel() < _LARGE or not 0 < x.numel() <= 2 * weight.shape[1] or weight.shape[0] % 2:
        return False
    return bias is None or (bias.dtype is torch.float32 and bias.is_cpu and bias.shape == weight.shape[:1])


def _by_blocks(x: torch.Tensor, weight: torch.Tensor, blocks: int) -> torch.Tensor:
    """``x [rows, in]``, ``weight [out, in]`` -> ``[rows, out]``, a product for each of the blocks of ``out``."""
    size = weight.shape[1]
    parts = weight.view(blocks, -1, size)
    if len(x) == 1:
        # MKL serves a column whose last stride is 1, as a lone row's may be, at a fifth of the speed.
        column = x.as_strided((blocks, size, 1), (0, x.stride(1), size))
        return torch.bmm(parts, column).view(1, -1)
    return torch.bmm(parts, x.t().expand(blocks, -1, -1)).view(len(weight), -1).t().contiguous()
