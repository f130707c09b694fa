"""Checks and choices that depend on shapes, dtypes and devices alone, made once per combination of them.

The ops of a layer are called with the same few combinations step after step, and a decode step is short: checking each
call anew costs as much of the host's time as launching its kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

import torch

T = TypeVar("T")
Key = tuple[torch.Size, torch.dtype, torch.device]


class Form(NamedTuple):
    """What a remembered function may ask of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@overload
def key_of(x: torch.Tensor) -> Key: ...
@overload
def key_of(x: torch.Tensor | None) -> Key | None: ...
def key_of(x: torch.Tensor | None) -> Key | None:
    """A tensor as an argument of a remembered function; None for None."""
    return None if x is None else (x.shape, x.dtype, x.device)


def forms(**keys: Key | None) -> list[tuple[str, Form | None]]:
    """The named arguments of a remembered function, as the functions of ``checks`` take them."""
    return [(name, None if key is None else Form(*key)) for name, key in keys.items()]


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """``function``, which depends on its arguments alone, not called again with those it has returned for.

    A compiler traces ``function`` itself: sizes may be symbols there, which have no hash.
    """
    known = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def call(*key: Any) -> T:
        return function(*key) if torch.compiler.is_compiling() else known(*key)

    return call
