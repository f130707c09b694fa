"""Whether tensors can be read in whole words: what a kernel for a mixer's layout asks before it is launched."""

from __future__ import annotations

import torch


def strides_in_words(x: torch.Tensor, size: int, dim: int = -1) -> tuple[int, ...] | None:
    """Strides of ``x`` if ``dim`` (negative) is contiguous and all its rows begin at multiples of ``size`` elements.

    None if not. A dimension of one element may have any stride.
    """
    strides = x.stride()
    if strides[dim] != 1 or x.data_ptr() % (size * x.element_size()):
        return None
    contiguous = len(strides) + dim
    for i, stride in enumerate(strides):
        if stride % size and i != contiguous and x.shape[i] > 1:
            return None
    return strides
