"""Initial values of sharded parameters: drawn for the full tensor, then sliced.

With the same seed on every rank the model is then the same at every tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.parallel.module import ShardedModule

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


def initialize(module: ShardedModule, name: str, draw: Callable[[torch.Tensor], object]) -> None:
    """Fill parameter ``name`` with its part of the full tensor that ``draw`` fills in place (float32 or wider)."""
    param = getattr(module, name)
    if _SKIP.get() or param.is_meta:
        return
    full = torch.empty(module.shards[name].shape, dtype=wide_dtype(param.dtype), device=param.device)
    draw(full)
    module.load_full(name, full)


def uniform(bound: float) -> Callable[[torch.Tensor], object]:
    """A draw from the uniform distribution over ``[-bound, bound]``."""
    return lambda full: full.uniform_(-bound, bound)
