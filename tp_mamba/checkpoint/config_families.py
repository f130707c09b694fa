"""The config.json dialects of the Mamba-1 families, read and written.

Three dialects: raw state-spaces (``d_model``, ``ssm_cfg``, no ``model_type``; mamba_ssm's reader), Mamba and
FalconMamba (transformers' names), and Jamba, of which only the mixer's fields matter here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from tp_mamba.checkpoint.config_fields import (
    CORRECT_IT,
    get_dtype,
    get_field,
    get_rank,
    get_token_id,
    get_token_ids,
)
from tp_mamba.checkpoint.errors import ConfigError
from tp_mamba.parallel.sharding import padded_size

if TYPE_CHECKING:
    from tp_mamba.config import MambaConfig

USE_MAMBA_1: Final = "give a checkpoint of a pure Mamba-1 model"

# mamba_ssm's Mamba(): the arguments that shape the layer, and those that only seed an untrained one.
_SSM_SHAPE_KEYS: Final = {"layer", "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}
_SSM_INIT_KEYS: Final = {
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "use_fast_path",
}

# Read under these names and written back from MambaConfig; anything else in a file travels in `extra`.
_COMMON_KEYS: Final = {
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "hidden_act",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "usable_vocab_size",
}
# Published -hf files repeat these sizes under the names of the raw dialect they were converted from.
_LEGACY_DUPLICATES: Final = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_inner": "intermediate_size",
}
_MAMBA_KEYS: Final = _COMMON_KEYS | {
    *_LEGACY_DUPLICATES,
    "intermediate_size",
    "state_size",
    "conv_kernel",
    "time_step_rank",
    "layer_norm_epsilon",
    "use_bias",
    "use_conv_bias",
    "residual_in_fp32",
}
_JAMBA_KEYS: Final = _COMMON_KEYS | {
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_dt_rank",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "rms_norm_eps",
}

_ARCHITECTURES: Final = {
    "mamba": "MambaForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "jamba": "JambaForCausalLM",
}


def parse_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :class:`tp_mamba.config.MambaConfig` from the content of a config.json.

    Raises:
        ConfigError: a needed field is missing or of the wrong type, sizes contradict each other, or the model
            is not Mamba-1.
    """
    model_type = fields.get("model_type")
    if model_type is None:
        if "d_model" in fields:
            return _parse_raw(fields)
        raise ConfigError(
            "there is neither model_type nor d_model, so this is no model's: give the config.json of a state-spaces "
            "Mamba, Mamba -hf, FalconMamba or Jamba checkpoint"
        )
    if model_type not in tuple(_ARCHITECTURES):
        raise ConfigError(
            f"model_type {model_type!r} is not a Mamba-1 model: give a checkpoint of type mamba, falcon_mamba or jamba "
            "(its mixer)"
        )
    _refuse_other_layers(get_field(fields, "ssm_cfg", dict, {}))
    return _parse_jamba(fields) if model_type == "jamba" else _parse_mamba(fields, model_type)


def _parse_raw(fields: Mapping[str, Any]) -> dict[str, Any]:
    ssm = get_field(fields, "ssm_cfg", dict, {})
    _refuse_other_layers(ssm)
    if unknown := sorted(set(ssm) - _SSM_SHAPE_KEYS - _SSM_INIT_KEYS):
        raise ConfigError(f"ssm_cfg has {unknown[0]!r}, which the Mamba-1 layer does not take: {USE_MAMBA_1}")
    for key, what in (("attn_layer_idx", "attention layers"), ("d_intermediate", "MLP blocks")):
        if fields.get(key):
            raise ConfigError(f"{key} is {fields[key]!r}, and {what} are not supported: {USE_MAMBA_1}")
    if not get_field(fields, "rms_norm", bool, True):
        raise ConfigError(
            "rms_norm is false, and blocks with LayerNorm are not supported: give a checkpoint trained with RMSNorm, "
            "as all published Mamba-1 models are"
        )
    hidden_size = get_field(fields, "d_model", int)
    usable = get_field(fields, "vocab_size", int)
    multiple = get_field(fields, "pad_vocab_size_multiple", int, 8)
    if multiple < 1:
        raise ConfigError(f"pad_vocab_size_multiple is {multiple}, it must be at least 1: {CORRECT_IT}")
    return {
        "model_type": "mamba",
        "hidden_size": hidden_size,
        "intermediate_size": int(get_field(ssm, "expand", float, 2) * hidden_size),
        "num_hidden_layers": get_field(fields, "n_layer", int),
        "state_size": get_field(ssm, "d_state", int, 16),
        "conv_kernel": get_field(ssm, "d_conv", int, 4),
        "time_step_rank": get_rank(ssm, "dt_rank", hidden_size),
        "vocab_size": padded_size(usable, multiple),
        "usable_vocab_size": usable,
        "use_bias": get_field(ssm, "bias", bool, False),
        "use_conv_bias": get_field(ssm, "conv_bias", bool, True),
        "residual_in_fp32": get_field(fields, "residual_in_fp32", bool, True),
        "tie_word_embeddings": get_field(fields, "tie_embeddings", bool, True),
        # The format has no place for special tokens; 0 is <|endoftext|> of the tokenizer these models were
        # trained with, and what the -hf conversions of the same weights declare.
        "bos_token_id": 0,
        "eos_token_ids": (0,),
        "pad_token_id": 0,
        "dtype": get_dtype(fields),
    }


def _parse_mamba(fields: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    falcon = model_type == "falcon_mamba"
    hidden_size = get_field(fields, "hidden_size", int)
    expanded = int(get_field(fields, "expand", float, 2) * hidden_size)
    intermediate_size = get_field(fields, "intermediate_size", int, expanded)
    # FalconMamba's published config says expand 16 beside the true intermediate_size 8192 = 2 * 4096, so there
    # the explicit size wins. A Mamba file with two different answers is damaged: no published one has them.
    if not falcon and "expand" in fields and intermediate_size != expanded:
        raise ConfigError(
            f"intermediate_size is {intermediate_size} but expand * hidden_size is {expanded}: "
            "correct one of them, or leave expand out"
        )
    parsed = _common(fields, model_type, _MAMBA_KEYS | ({"mixer_rms_eps"} if falcon else {"expand"}))
    parsed.update(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        state_size=get_field(fields, "state_size", int, 16),
        conv_kernel=get_field(fields, "conv_kernel", int, 4),
        time_step_rank=get_rank(fields, "time_step_rank", hidden_size),
        layer_norm_epsilon=get_field(fields, "layer_norm_epsilon", float, 1e-5),
        use_bias=get_field(fields, "use_bias", bool, False),
        use_conv_bias=get_field(fields, "use_conv_bias", bool, True),
        residual_in_fp32=get_field(fields, "residual_in_fp32", bool, True),
        tie_word_embeddings=get_field(fields, "tie_word_embeddings", bool, True),
        bos_token_id=get_token_id(fields, "bos_token_id", 0),
        eos_token_ids=get_token_ids(fields, "eos_token_id", 0),
        pad_token_id=get_token_id(fields, "pad_token_id", 0),
    )
    for legacy, name in _LEGACY_DUPLICATES.items():
        if (repeated := get_field(fields, legacy, int, parsed[name])) != parsed[name]:
            raise ConfigError(
                f"{legacy} is {repeated} but {name} is {parsed[name]}, two names of one size: correct one of them, or "
                f"leave {legacy} out"
            )
    if falcon:
        parsed.update(mixer_norm="weightless", mixer_rms_eps=get_field(fields, "mixer_rms_eps", float, 1e-6))
    return parsed


def _parse_jamba(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = get_field(fields, "hidden_size", int)
    eps = get_field(fields, "rms_norm_eps", float, 1e-6)
    # Jamba's intermediate_size is the width of its MLPs; the mixer's is mamba_expand * hidden_size.
    return _common(fields, "jamba", _JAMBA_KEYS) | {
        "hidden_size": hidden_size,
        "intermediate_size": int(get_field(fields, "mamba_expand", float, 2) * hidden_size),
        "state_size": get_field(fields, "mamba_d_state", int, 16),
        "conv_kernel": get_field(fields, "mamba_d_conv", int, 4),
        "time_step_rank": get_rank(fields, "mamba_dt_rank", hidden_size),
        "layer_norm_epsilon": eps,
        "use_bias": get_field(fields, "mamba_proj_bias", bool, False),
        "use_conv_bias": get_field(fields, "mamba_conv_bias", bool, True),
        "residual_in_fp32": False,
        "tie_word_embeddings": get_field(fields, "tie_word_embeddings", bool, False),
        "mixer_norm": "weighted",
        "mixer_rms_eps": eps,
        "bos_token_id": get_token_id(fields, "bos_token_id", 1),
        "eos_token_ids": get_token_ids(fields, "eos_token_id", 2),
        "pad_token_id": get_token_id(fields, "pad_token_id", 0),
    }


def _common(fields: Mapping[str, Any], model_type: str, known: set[str]) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": get_field(fields, "num_hidden_layers", int),
        "vocab_size": get_field(fields, "vocab_size", int),
        "usable_vocab_size": get_field(fields, "usable_vocab_size", int, None),
        "hidden_act": get_field(fields, "hidden_act", str, "silu"),
        "dtype": get_dtype(fields),
        "extra": {key: value for key, value in fields.items() if key not in known},
    }


def render_config(config: MambaConfig) -> dict[str, Any]:
    """The content of a config.json in transformers' dialect for ``config``, fields of its original file kept."""
    rendered: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0]
        if len(config.eos_token_ids) == 1
        else list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    expand, remainder = divmod(config.intermediate_size, config.hidden_size)
    if config.model_type == "jamba":
        rendered |= {
            "mamba_d_state": config.state_size,
            "mamba_d_conv": config.conv_kernel,
            "mamba_expand": config.intermediate_size / config.hidden_size if remainder else expand,
            "mamba_dt_rank": config.time_step_rank,
            "mamba_conv_bias": config.use_conv_bias,
            "mamba_proj_bias": config.use_bias,
            "rms_norm_eps": config.layer_norm_epsilon,
        }
    else:
        rendered |= {
            "intermediate_size": config.intermediate_size,
            "state_size": config.state_size,
            "conv_kernel": config.conv_kernel,
            "time_step_rank": config.time_step_rank,
            "layer_norm_epsilon": config.layer_norm_epsilon,
            "use_bias": config.use_bias,
            "use_conv_bias": config.use_conv_bias,
            "residual_in_fp32": config.residual_in_fp32,
        }
        if config.model_type == "falcon_mamba":
            rendered["mixer_rms_eps"] = config.mixer_rms_eps
        if not remainder:
            rendered["expand"] = expand  # an integer in transformers; elsewhere intermediate_size says it all
    if config.usable_vocab_size is not None:
        rendered["usable_vocab_size"] = config.usable_vocab_size
    if config.dtype is not None:
        rendered["dtype"] = str(config.dtype).removeprefix("torch.")
    return rendered | dict(config.extra)


def _refuse_other_layers(ssm_cfg: Mapping[str, Any]) -> None:
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise ConfigError(f"ssm_cfg.layer is {layer!r}, only 'Mamba1' is supported: {USE_MAMBA_1}")
