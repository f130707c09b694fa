"""Launches remembered by form: how a kernel is launched is worked out once per form of call.

Triton's own launch binds arguments by name, asks each for its type and alignment, and joins all of it to the key of a
compiled kernel: most of a launch's time on the host. Cuts, strides and flags take as long again. All of it depends on
the *form* of a call alone: shapes, strides, dtypes and device of its tensors, and the values that are no tensors. The
second call of a form goes from its tensors straight to the compiled kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from tp_mamba.kernels.common.device import on_device_of

_ALIGNMENT = 16
"""Bytes: Triton compiles one kernel for pointers that are multiples of it and one for others, and no launch here asks
for more of a pointer."""

_MOST_FORMS = 16384
"""Forms remembered, of all kernels together; one takes about 2 KB."""

_remembered: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = {}
"""Form -> what launches its compiled kernel, and the kernel's arguments behind the tensors."""


class Launch(NamedTuple):
    """What a kernel is launched with, besides its tensors."""

    kernel: Any
    """A function decorated with ``triton.jit``."""
    grid: tuple[int, ...]
    values: tuple[Any, ...]
    """Sizes, strides and whatever else the kernel takes by position after its tensors."""
    named: dict[str, Any]
    """Its constants, and options of Triton's."""


def launcher(tensors: int) -> Callable[[Callable[..., Launch | None]], Callable[..., bool]]:
    """Decorate a function that says how a kernel is launched, so that it launches it.

    The function takes the kernel's tensors in the kernel's order, and after them values that can be hashed. It asks of
    a tensor no more than its shape, strides, dtype and device, and whether it begins at a multiple of up to 16 bytes.
    Where the kernel is not for the call it returns None, and the decorated function False.

    A form is remembered if all tensors begin at multiples of 16 bytes and Triton has compiled a kernel, which its
    interpreter does not. Hooks of profilers are called for every launch; environment variables that make Triton compile
    otherwise, such as ``TRITON_DEBUG``, are to be set before a form's first launch.

    Args:
        tensors: how many arguments, from the first on, are tensors or None; the first is a tensor.
    """

    def decorate(describe: Callable[..., Launch | None]) -> Callable[..., bool]:
        @functools.wraps(describe)
        def launch(*arguments: Any) -> bool:
            operands = arguments[:tensors]
            form = [describe, operands[0].get_device(), *arguments[tensors:]]
            pointers: list[int | None] = []
            bits = 0
            for x in operands:
                if x is None:
                    form.append(None)
                    pointers.append(None)
                else:
                    pointer = x.data_ptr()
                    bits |= pointer
                    pointers.append(pointer)
                    form += (x.shape, x.stride(), x.dtype)
            key = tuple(form)
            found = None if bits % _ALIGNMENT else _remembered.get(key)
            with on_device_of(operands[0]):
                if found is not None:
                    run, rest = found
                    run(*pointers, *rest)
                    return True
                new = describe(*arguments)
                if new is None:
                    return False
                compiled = new.kernel[new.grid](*operands, *new.values, **new.named)
            if compiled is not None and not bits % _ALIGNMENT:
                if len(_remembered) >= _MOST_FORMS:
                    _remembered.clear()
                _remembered[key] = _with_its_arguments(compiled, new, tensors)
            return True

        return launch

    return decorate


def _with_its_arguments(
    compiled: Any, new: Launch, tensors: int
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """What launches ``compiled``, given all of the kernel's arguments in its order, and those behind the tensors."""
    by_name = new.kernel.arg_names[tensors + len(new.values) :]
    grid = (*new.grid, 1, 1)[:3]
    # By name, not compiled[grid]: a kernel that Triton compiles in the background stands in for itself by attribute.
    return compiled.__getitem__(grid), (*new.values, *(new.named[name] for name in by_name))
