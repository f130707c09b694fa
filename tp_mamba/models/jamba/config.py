"""config.json of Jamba, of which only what concerns its Mamba layers is read; the rest travels in ``extra``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tp_mamba.models.common_fields import parse_common, render_common
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.fields import get_field, get_rank, get_width

KEYS: Final = frozenset(
    {
        "mamba_d_state",
        "mamba_d_conv",
        "mamba_expand",
        "mamba_dt_rank",
        "mamba_conv_bias",
        "mamba_proj_bias",
        "rms_norm_eps",
    }
)
"""Jamba's own keys that are written back from the configuration."""


def parse(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :class:`MambaConfig` from a ``config.json`` of ``model_type`` jamba.

    Required are ``hidden_size``, ``num_hidden_layers`` and ``vocab_size``. The rest has transformers' defaults:
    ``mamba_d_state`` 16, ``mamba_d_conv`` 4, ``mamba_expand`` 2, ``mamba_dt_rank`` ``"auto"`` (``ceil(H / 16)``),
    ``mamba_conv_bias`` true, ``mamba_proj_bias`` and ``tie_word_embeddings`` false, ``rms_norm_eps`` 1e-6, ids of
    beginning, end and padding 1, 2 and 0.

    Raises:
        ConfigError: a required field is missing, or one has the wrong type.
    """
    parsed = parse_common(fields, known=KEYS, tied=False, bos=1, eos=2, pad=0)
    H = parsed["hidden_size"]
    eps = get_field(fields, "rms_norm_eps", float, 1e-6)
    return parsed | {
        # Jamba's intermediate_size is the width of its MLPs.
        "intermediate_size": get_width(fields, "mamba_expand", H),
        "state_size": get_field(fields, "mamba_d_state", int, 16),
        "conv_kernel": get_field(fields, "mamba_d_conv", int, 4),
        "time_step_rank": get_rank(fields, "mamba_dt_rank", H),
        "layer_norm_epsilon": eps,
        "use_bias": get_field(fields, "mamba_proj_bias", bool, False),
        "use_conv_bias": get_field(fields, "mamba_conv_bias", bool, True),
        "residual_in_fp32": False,
        "mixer_norm": "weighted",
        "mixer_rms_eps": eps,
    }


def render(config: MambaConfig) -> dict[str, Any]:
    """The content of a ``config.json`` in transformers' dialect."""
    expand, remainder = divmod(config.intermediate_size, config.hidden_size)
    rendered = render_common(config, "JambaForCausalLM") | {
        "mamba_d_state": config.state_size,
        "mamba_d_conv": config.conv_kernel,
        "mamba_expand": config.intermediate_size / config.hidden_size if remainder else expand,
        "mamba_dt_rank": config.time_step_rank,
        "mamba_conv_bias": config.use_conv_bias,
        "mamba_proj_bias": config.use_bias,
        "rms_norm_eps": config.layer_norm_epsilon,
    }
    return rendered | dict(config.extra)
