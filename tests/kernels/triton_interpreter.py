"""Triton's interpreter, repaired where it computes something else than a GPU, or nothing at all."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def repair() -> None:
    """Patch the interpreter of this process, once.

    It truncates float32 to bfloat16 where a GPU rounds to nearest even, which our error bounds need; and in
    Triton 3.6 it makes a loop bound with ``int()`` of a one-element array, which numpy has since refused.
    """
    from triton.runtime import interpreter

    convert, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def rounding_convert(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.name != "bf16" or source.name != "fp32":
            return convert(value, source, target, mode)
        bits = torch.from_numpy(value.copy()).to(torch.bfloat16).view(torch.uint16)
        return bits.numpy().reshape(value.shape)

    def indexing_patch_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._convert_float = rounding_convert
    interpreter._patch_lang_tensor = indexing_patch_tensor
