"""The two small configuration objects a mixer accepts; any object with these attributes serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tp_mamba.kernels.common.dtypes import DTYPES, FLOATS, HALVES


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What a mixer asks of its model."""

    dtype: torch.dtype
    """Dtype of the parameters, of the activations and, by default, of the convolution state."""

    weight_kind: str = "dense"
    """The registered name of what the weights of the four projections are (:mod:`tp_mamba.layers.weights`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """How recurrent state is kept, under vLLM's names."""

    mamba_cache_dtype: torch.dtype | str = "auto"
    """Dtype of the convolution state; ``"auto"`` is the model's dtype."""

    mamba_ssm_cache_dtype: torch.dtype | str = "auto"
    """Dtype of the SSM state; ``"auto"`` is float32 (float64 in a float64 model)."""

    enable_prefix_caching: bool = False
    """Whether an engine keeps states for later prompts that begin alike."""

    mamba_block_size: int | None = None
    """Prompt tokens between two such states, beside those where prompts end or part; None: the engine's default."""


def resolve_compute_dtype(value: torch.dtype | str | None, held: torch.dtype, what: str) -> torch.dtype:
    """The dtype of the activations of a model with parameters in ``held``; None stands for the same.

    Raises:
        ValueError: neither ``held`` nor a 16-bit dtype beside float32 parameters.
    """
    dtype = held if value is None else resolve_dtype(value, None, what)
    if dtype != held and not (held == torch.float32 and dtype in HALVES):
        raise ValueError(
            f"{what}={dtype} does not go with parameters in {held}: use that of the parameters, or bfloat16 or float16 "
            "with float32 parameters"
        )
    return dtype


def resolve_dtype(value: torch.dtype | str, auto: torch.dtype | None, what: str) -> torch.dtype:
    """A dtype that parameters and states can have, from itself, from its name, or from ``"auto"``.

    Args:
        auto: what ``"auto"`` stands for; None where that is no answer.
        what: the argument's name, for the message.

    Raises:
        ValueError: not one of the four dtypes.
    """
    if value == "auto" and auto is not None:
        return auto
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in FLOATS:
        raise ValueError(
            f"{what}={value!r} is not supported: use one of {', '.join(DTYPES)}"
            + (' or "auto"' if auto else "")
        )
    return dtype
