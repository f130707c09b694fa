"""Products in plain torch: the library's own, a batch of blocks for one or two rows of float32, and sums over slices.

MKL runs a product of one or two rows (a decoded token) on one thread, at half of what that thread could read. A batch
of products ``block @ column``, one block of the weight's rows each, runs on all threads. Nothing is repacked, so no
weight is held twice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

MOST_BLOCKS = 16
LARGE = 100_000
"""Elements of a weight from which blocks pay: less is read by one thread before others have started."""


def prefers_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether this is a well-formed float32 product of one or two rows on a CPU, not tiny, without a gradient."""
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not (x.is_cpu and weight.is_cpu):
        return False
    tracked = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if tracked and torch.is_grad_enabled():
        return False
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    out_size, in_size = weight.shape
    if weight.numel() < LARGE or out_size % 2 or not 0 < x.numel() <= 2 * in_size:
        return False
    return bias is None or (bias.dtype is torch.float32 and bias.is_cpu and bias.shape == weight.shape[:1])


def linear_by_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x [..., in] @ weight [out, in].T + bias`` for what :func:`prefers_blocks`: one product per block of ``out``."""
    out_size, in_size = weight.shape
    blocks = math.gcd(out_size, MOST_BLOCKS)
    parts = weight.view(blocks, -1, in_size)
    rows = x if x.dim() == 2 else x.reshape(-1, in_size)
    if len(rows) == 1:
        # MKL serves a column whose last stride is 1, as a lone row's may be, at a fifth of the speed.
        column = rows.as_strided((blocks, in_size, 1), (0, rows.stride(1), in_size))
        y = torch.bmm(parts, column).view(1, -1)
    else:
        y = torch.bmm(parts, rows.t().expand(blocks, -1, -1)).view(out_size, -1).t().contiguous()
    if x.dim() != 2:
        y = y.view(*x.shape[:-1], out_size)
    return y if bias is None else y.add_(bias)


def skinny_linear_cpu(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Same contract as ``mixer.launch``; float32 inside."""
    out.copy_(F.linear(x.float(), weight.float()))


def slices_cpu(sums: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, width: int) -> None:
    """Write to ``sums [slices, M, out]`` float32 the products over each ``width`` columns; the last may be fewer."""
    x, weight = x.float(), weight.float()
    whole = x.shape[1] // width
    if whole:
        x_slices, weight_slices = (y[:, : whole * width].unflatten(1, (whole, width)) for y in (x, weight))
        torch.bmm(x_slices.transpose(0, 1), weight_slices.permute(1, 2, 0), out=sums[:whole])
    if whole < len(sums):
        torch.mm(x[:, whole * width :], weight[:, whole * width :].t(), out=sums[whole])


def add_slices_cpu(sums: torch.Tensor) -> torch.Tensor:
    """``[slices, ...]`` -> ``[...]``, added in an aligned binary tree."""
    count = len(sums)
    if count == 1:
        return sums[0]
    half = 1 << (count - 1).bit_length() - 1
    return add_slices_cpu(sums[:half]) + add_slices_cpu(sums[half:])
