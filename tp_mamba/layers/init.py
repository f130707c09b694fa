"""Initial values of sharded parameters: drawn for the full tensor, then sliced.

With the same seed on every rank the model is then the same at every tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_SKIP: ContextVar[bool] = ContextVar("tp_mamba_skip_init", default=False)


@contextmanager
def skip_init() -> Iterator[None]:
    """Leave the parameters of modules built inside uninitialised: a checkpoint is about to fill them."""
    token = _SKIP.set(True)
    try:
        yield
    finally:
        _SKIP.reset(token)


def initialization_skipped() -> bool:
    """Whether :func:`skip_init` is in force."""
    return _SKIP.get()


def initialize(param: nn.Parameter, draw: Callable[[torch.Tensor], object]) -> None:
    """Fill ``param`` with its slice of the full tensor that ``draw`` fills in place (float32 or wider)."""
    if _SKIP.get() or param.is_meta:
        return
    full = torch.empty(
        param.sharded.split.shape,  # type: ignore[attr-defined]
        dtype=torch.promote_types(param.dtype, torch.float32),
        device=param.device,
    )
    draw(full)
    param.weight_loader(param, full)  # type: ignore[attr-defined]


def uniform(bound: float) -> Callable[[torch.Tensor], object]:
    """A draw from the uniform distribution over ``[-bound, bound]``."""
    return lambda full: full.uniform_(-bound, bound)
