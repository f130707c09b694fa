"""Triton's interpreter, repaired where it computes something else than a GPU, or nothing at all; and made faster."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


@functools.cache
def repair() -> None:
    """Patch the interpreter of this process, once.

    It truncates float32 to bfloat16 where a GPU rounds to nearest even, and rounds the product of an fma, against
    what our error bounds need; it multiplies the bits of bfloat16 matrices as integers; it reduces one element after
    the other where lanes exchange halves; and in Triton 3.6 it makes a loop bound with ``int()`` of a one-element
    array, which numpy has since refused.

    A launch makes Triton's language the interpreted one for as long as it takes, once; not, which took half of its
    time, before every function that the kernel calls as well.
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

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    dot = builder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = convert(x.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def halving_reduce(self: Any, operands: Any) -> Any:
        """One operand whose size is a power of two: the upper half is combined with the lower until one is left."""
        (operand,) = operands
        values = operand.handle.data
        while values.shape[self.axis] > 1:
            lower, upper = np.split(values, 2, axis=self.axis)
            pair = (self.to_tensor(half, operand.dtype) for half in (lower, upper))
            values = self.combine_fn.fn(*pair).handle.data
        values = values if self.keep_dims else values.squeeze(self.axis)
        return [self.to_tensor(values, operand.dtype)]

    interpreter.ReduceOps.generic_reduce = halving_reduce
    builder.create_fma = fma
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    interpreter._convert_float = rounding_convert
    interpreter._patch_lang_tensor = indexing_patch_tensor

    patch, inside = interpreter._patch_lang, False
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_once(fn: Any) -> Any:
        nonlocal inside
        if inside:
            return SimpleNamespace(restore=lambda: None)
        scope, inside = patch(language), True

        def restore() -> None:
            nonlocal inside
            scope.restore()
            inside = False

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = patch_once
