"""Checks that depend on shapes, dtypes and devices alone, made once per combination of them.

The ops of a layer are called with the same few combinations step after step, and a decode step is short: checking each
call anew costs as much of the host's time as launching its kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch

Key = tuple[torch.Size, torch.dtype, torch.device]


class Form(NamedTuple):
    """What a remembered check may ask of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@overload
def key_of(x: torch.Tensor) -> Key: ...
@overload
def key_of(x: torch.Tensor | None) -> Key | None: ...
def key_of(x: torch.Tensor | None) -> Key | None:
    """A tensor as an argument of a remembered check; None for None."""
    return None if x is None else (x.shape, x.dtype, x.device)


def forms(**keys: Key | None) -> list[tuple[str, Form | None]]:
    """The named arguments of a remembered check, as the functions of ``checks`` take them."""
    return [(name, None if key is None else Form(*key)) for name, key in keys.items()]


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """``check``, which raises or returns nothing, not called again with arguments that it has let pass.

    A compiler traces ``check`` itself: sizes may be symbols there, which have no hash.
    """
    passed = functools.lru_cache(maxsize=4096)(check)

    @functools.wraps(check)
    def call(*key: Any) -> None:
        (check if torch.compiler.is_compiling() else passed)(*key)

    return call
