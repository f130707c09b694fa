"""Whether tensors can be read in whole words: what a kernel for a mixer's layout asks before it is launched."""

from __future__ import annotations

import torch


def in_words(size: int, *tensors: torch.Tensor) -> bool:
    """Whether the last dimension is contiguous and each of its rows begins at a multiple of ``size`` elements."""
    for x in tensors:
        *outer, last = x.stride()
        if last != 1 or x.data_ptr() % (size * x.element_size()):
            return False
        # The stride of a dimension of one element says nothing.
        for stride, length in zip(outer, x.shape, strict=False):
            if stride % size and length > 1:
                return False
    return True
