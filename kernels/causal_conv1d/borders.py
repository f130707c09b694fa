"""Where the sequences of a packed batch begin and end, as each of its tokens sees it."""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.integers import cdiv

_BLOCK_T = 256


@triton.jit
def since_of(border):
    """Tokens of the same sequence before this one, K - 1 if there are more."""
    return border & 7


@triton.jit
def until_of(border):
    """Tokens of the same sequence from this one on, itself included, K if there are more."""
    return border >> 3


@triton.jit
def border_in(t, length, K: tl.constexpr):
    """The border of token t of a sequence from 0 to ``length``."""
    since = tl.minimum(tl.maximum(t, 0), K - 1)
    return (since + 8 * tl.minimum(tl.maximum(length - t, 0), K)).to(tl.int32)


@triton.jit(do_not_specialize=["T", "num_seqs", "rounds"], do_not_specialize_on_alignment=["starts_ptr"])
def _borders_kernel(
    borders_ptr,  # [T] int32, out
    owners_ptr,  # [T] int32, out
    starts_ptr,  # [S + 1] integers, in
    T,
    num_seqs,
    rounds,  # of the bisection: enough for num_seqs + 1 entries
    K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    low = tl.zeros_like(t)
    high = low + (num_seqs + 1)
    for _ in range(rounds):
        middle = (low + high) // 2
        searching = low < high
        before = tl.load(starts_ptr + middle, mask=searching, other=0) <= t
        high = tl.where(searching & ~before, middle, high)
        low = tl.where(searching & before, middle + 1, low)
    owner = low - 1
    inside = (owner >= 0) & (owner < num_seqs) & (t < T)
    start = tl.load(starts_ptr + owner, mask=inside, other=0)
    stop = tl.load(starts_ptr + owner + 1, mask=inside, other=0)
    border = border_in((t - start).to(tl.int32), (stop - start).to(tl.int32), K)
    tl.store(borders_ptr + t, tl.where(inside, border, 0), mask=t < T)
    tl.store(owners_ptr + t, tl.where(inside, owner, 0), mask=t < T)


def borders(query_start_loc: torch.Tensor, T: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(borders, owners)``, both ``[T]`` int32: :func:`since_of` and :func:`until_of` of every token, its sequence.

    Zeros outside all sequences.
    """
    found, owners = torch.empty(2, T, dtype=torch.int32, device=query_start_loc.device)
    num_seqs = query_start_loc.shape[0] - 1
    if T:
        with on_device_of(query_start_loc):
            _borders_kernel[(cdiv(T, _BLOCK_T),)](
                found, owners, query_start_loc, T, num_seqs, (num_seqs + 1).bit_length(), K=K, BLOCK_T=_BLOCK_T
            )  # fmt: skip
    return found, owners
