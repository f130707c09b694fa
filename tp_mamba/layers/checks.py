"""What a mixer refuses: sizes and options when it is built, inputs when it is called."""

from __future__ import annotations

from typing import Any

import torch

from tp_mamba.batch import MambaMetadata
from tp_mamba.kernels.common.limits import check_activation, check_state_size
from tp_mamba.parallel.partial import Scattered


def check_sizes(name: str, **sizes: int) -> None:
    """Raise ValueError for a size that is no positive integer."""
    for letter, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: size {letter} is {size!r}, it must be a positive integer")


def check_options(
    name: str, state_size: int, activation: str, is_lora_enabled: bool, cache_config: Any
) -> None:
    """Raise ValueError for a state size or an activation without a kernel, or an option without its feature."""
    check_state_size(name, state_size)
    check_activation(name, activation)
    if is_lora_enabled:
        raise ValueError(
            f"{name}: is_lora_enabled is set but adapters are not available yet: merge the adapter into the "
            "checkpoint and leave it False"
        )
    block_size = getattr(cache_config, "mamba_block_size", None)
    if block_size is None:
        return
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(
            f"{name}: cache_config.mamba_block_size is {block_size!r}: it is a number of tokens, at least 1"
        )
    if not getattr(cache_config, "enable_prefix_caching", False):
        raise ValueError(
            f"{name}: cache_config.mamba_block_size is {block_size} but no states are kept: set "
            "enable_prefix_caching too"
        )


def check_grad_batch(name: str, batch: MambaMetadata, *, stateful: bool) -> None:
    """Raise RuntimeError for a batch that advances states in place, which have no gradient."""
    if batch.num_padded_decodes:
        raise RuntimeError(
            f"{name}: the batch has {batch.num_padded_decodes} decode rows and gradients are tracked, but a decode "
            "step has no backward: decode under torch.no_grad()"
        )
    if stateful:
        raise RuntimeError(
            f"{name}: the batch updates states in place and gradients are tracked, which would stop at the states: "
            "call segment(), which takes and returns them, or run under torch.no_grad()"
        )


def check_hidden_states(name: str, h: torch.Tensor | Scattered, hidden_size: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless ``h`` is ``[T, H]`` or ``[B, L, H]`` in ``dtype``."""
    if h.dim() not in (2, 3) or h.shape[-1] != hidden_size:
        raise ValueError(
            f"{name}: got hidden states of shape {list(h.shape)}, expected packed [T, {hidden_size}] or "
            f"dense [B, L, {hidden_size}]"
        )
    if h.dtype != dtype:
        raise ValueError(
            f"{name}: got hidden states in {h.dtype}, the parameters are in {dtype}: convert one of them"
        )
