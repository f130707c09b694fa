"""The two small configuration objects a mixer accepts; any object with these attributes serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What a mixer asks of its model."""

    dtype: torch.dtype
    """Dtype of the parameters, of the activations and, by default, of the convolution state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """How recurrent state is kept, under vLLM's names."""

    mamba_cache_dtype: torch.dtype | str = "auto"
    """Dtype of the convolution state; ``"auto"`` is the model's dtype."""

    mamba_ssm_cache_dtype: torch.dtype | str = "auto"
    """Dtype of the SSM state; ``"auto"`` is float32 (float64 in a float64 model)."""

    mamba_block_size: int | None = None
    """Number of tokens between states kept for reuse by later prompts. Not available yet: leave None."""

    enable_prefix_caching: bool = False
    """Whether such states are kept. Not available yet: leave False."""


def resolve_dtype(value: torch.dtype | str, auto: torch.dtype, what: str) -> torch.dtype:
    """A floating-point torch dtype from one, from its name (``"float32"``), or from ``"auto"``.

    Raises:
        ValueError: not the name of a floating-point dtype.
    """
    if value == "auto":
        return auto
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f'{what}={value!r} is not a floating-point dtype: use "auto", "float32", "bfloat16" or "float16"'
        )
    return dtype
