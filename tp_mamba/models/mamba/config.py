"""config.json of Mamba in transformers' dialect, and the keys that FalconMamba shares with it.

Which key decides is what transformers 5.23 does (``models/mamba/configuration_mamba.py``): ``intermediate_size`` is
D where it stands, else ``int(expand * hidden_size)``; ``d_model``, ``n_layer``, ``d_inner`` and ``ssm_cfg``, which
conversions of raw files leave behind, are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tp_mamba.errors import ConfigError
from tp_mamba.models.common_fields import parse_common, render_common
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.fields import USE_MAMBA_1, get_field, get_rank, get_width
from tp_mamba.quoting import quoted

SHARED_KEYS: Final = frozenset(
    {
        "d_model",
        "n_layer",
        "d_inner",
        "intermediate_size",
        "state_size",
        "conv_kernel",
        "time_step_rank",
        "layer_norm_epsilon",
        "use_bias",
        "use_conv_bias",
        "residual_in_fp32",
    }
)
"""Keys of Mamba and FalconMamba that are written back from the configuration, or, inert and in time wrong, dropped."""


def parse(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :class:`MambaConfig` from a ``config.json`` of ``model_type`` mamba.

    Required are ``hidden_size``, ``num_hidden_layers`` and ``vocab_size``. The rest has transformers' defaults:
    ``state_size`` 16, ``conv_kernel`` 4, ``expand`` 2, ``time_step_rank`` ``"auto"`` (``ceil(H / 16)``),
    ``layer_norm_epsilon`` 1e-5, ``use_bias`` false, ``use_conv_bias``, ``residual_in_fp32`` and
    ``tie_word_embeddings`` true, ``hidden_act`` silu, token ids 0.

    Raises:
        ConfigError: a required field is missing, one has the wrong type, or the layers are not Mamba-1.
    """
    return parse_shared(fields, SHARED_KEYS | {"expand"})


def parse_shared(fields: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """:func:`parse` with the family's own set of keys that do not travel in ``extra``."""
    refuse_other_layers(fields.get("ssm_cfg"))
    parsed = parse_common(fields, known=known, tied=True, bos=0, eos=0, pad=0)
    H = parsed["hidden_size"]
    D = get_field(fields, "intermediate_size", int, None)
    return parsed | {
        "intermediate_size": get_width(fields, "expand", H) if D is None else D,
        "state_size": get_field(fields, "state_size", int, 16),
        "conv_kernel": get_field(fields, "conv_kernel", int, 4),
        "time_step_rank": get_rank(fields, "time_step_rank", H),
        "layer_norm_epsilon": get_field(fields, "layer_norm_epsilon", float, 1e-5),
        "use_bias": get_field(fields, "use_bias", bool, False),
        "use_conv_bias": get_field(fields, "use_conv_bias", bool, True),
        "residual_in_fp32": get_field(fields, "residual_in_fp32", bool, True),
    }


def render(config: MambaConfig) -> dict[str, Any]:
    """The content of a ``config.json`` in transformers' dialect; a raw state-spaces model is written in it too."""
    return render_shared(config, "MambaForCausalLM") | dict(config.extra)


def render_shared(config: MambaConfig, architecture: str) -> dict[str, Any]:
    """The keys that Mamba and FalconMamba share, without ``config.extra``."""
    rendered = render_common(config, architecture) | {
        "intermediate_size": config.intermediate_size,
        "state_size": config.state_size,
        "conv_kernel": config.conv_kernel,
        "time_step_rank": config.time_step_rank,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "use_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias,
        "residual_in_fp32": config.residual_in_fp32,
    }
    expand, remainder = divmod(config.intermediate_size, config.hidden_size)
    if not remainder:
        rendered["expand"] = expand  # a whole number in transformers; elsewhere intermediate_size says it all
    return rendered


def refuse_other_layers(ssm_cfg: object) -> None:
    """Refuse layers that are not Mamba-1, as ``ssm_cfg.layer`` of mamba_ssm names them.

    Raises:
        ConfigError: it names another layer.
    """
    layer = ssm_cfg.get("layer", "Mamba1") if isinstance(ssm_cfg, Mapping) else "Mamba1"
    if layer != "Mamba1":
        raise ConfigError(f"ssm_cfg.layer is {quoted(layer)}, only 'Mamba1' is supported: {USE_MAMBA_1}")
