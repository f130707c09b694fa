"""config.json of the original state-spaces checkpoints: ``d_model`` and ``ssm_cfg``, no ``model_type``.

Its keys are the arguments of mamba_ssm's ``MambaConfig`` and ``MixerModel`` (``norm_epsilon``), and in ``ssm_cfg``
those of its ``Mamba`` layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tp_mamba.errors import ConfigError
from tp_mamba.models.fields import (
    CORRECT_IT,
    USE_MAMBA_1,
    get_dtype,
    get_field,
    get_rank,
    get_token_id,
    get_token_ids,
    get_weight_kind,
    get_width,
)
from tp_mamba.models.mamba.config import refuse_other_layers
from tp_mamba.parallel.sharding import padded_size
from tp_mamba.quoting import quoted

# The arguments that shape the layer, and those that only seed an untrained one.
_SSM_SHAPE_KEYS: Final = {"layer", "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}
_SSM_INIT_KEYS: Final = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}


def is_raw(fields: Mapping[str, Any]) -> bool:
    """Whether ``fields`` are in this dialect."""
    return fields.get("model_type") is None and "d_model" in fields


def parse_raw(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``MambaConfig`` from a state-spaces ``config.json``.

    Required are ``d_model``, ``n_layer`` and ``vocab_size``. The rest has mamba_ssm's defaults: in ``ssm_cfg``
    ``d_state`` 16, ``d_conv`` 4, ``expand`` 2, ``dt_rank`` ``"auto"`` (``ceil(H / 16)``), ``bias`` false,
    ``conv_bias`` true; beside it ``norm_epsilon`` 1e-5, ``residual_in_fp32``, ``rms_norm`` and ``tie_embeddings``
    true, ``pad_vocab_size_multiple`` 8.

    Raises:
        ConfigError: a required field is missing, one has the wrong type, or the blocks are not Mamba-1's.
    """
    ssm = get_field(fields, "ssm_cfg", dict, {})
    refuse_other_layers(ssm)
    if unknown := sorted(set(ssm) - _SSM_SHAPE_KEYS - _SSM_INIT_KEYS):
        raise ConfigError(
            f"ssm_cfg has {quoted(unknown[0])}, which the Mamba-1 layer does not take: {USE_MAMBA_1}"
        )
    for key, what in (("attn_layer_idx", "attention layers"), ("d_intermediate", "MLP blocks")):
        if fields.get(key):
            raise ConfigError(f"{key} is {quoted(fields[key])}, and {what} are not supported: {USE_MAMBA_1}")
    if not get_field(fields, "rms_norm", bool, True):
        raise ConfigError(
            "rms_norm is false, and blocks with LayerNorm are not supported: give a checkpoint trained with RMSNorm, "
            "as all published Mamba-1 models are"
        )
    hidden_size = get_field(fields, "d_model", int)
    usable = get_field(fields, "vocab_size", int)
    multiple = get_field(fields, "pad_vocab_size_multiple", int, 8)
    if multiple < 1:
        raise ConfigError(
            f"pad_vocab_size_multiple is {quoted(multiple)}, it must be at least 1: {CORRECT_IT}"
        )
    return {
        "model_type": "mamba",
        "hidden_size": hidden_size,
        "intermediate_size": get_width(ssm, "expand", hidden_size),
        "num_hidden_layers": get_field(fields, "n_layer", int),
        "state_size": get_field(ssm, "d_state", int, 16),
        "conv_kernel": get_field(ssm, "d_conv", int, 4),
        "time_step_rank": get_rank(ssm, "dt_rank", hidden_size),
        "vocab_size": padded_size(usable, multiple),
        "usable_vocab_size": usable,
        "layer_norm_epsilon": get_field(fields, "norm_epsilon", float, 1e-5),
        "use_bias": get_field(ssm, "bias", bool, False),
        "use_conv_bias": get_field(ssm, "conv_bias", bool, True),
        "residual_in_fp32": get_field(fields, "residual_in_fp32", bool, True),
        "tie_word_embeddings": get_field(fields, "tie_embeddings", bool, True),
        # mamba_ssm has no place for special tokens; 0 is <|endoftext|> of the tokenizer these models were trained
        # with, and what the -hf conversions of the same weights declare.
        "bos_token_id": get_token_id(fields, "bos_token_id", 0),
        "eos_token_ids": get_token_ids(fields, "eos_token_id", 0),
        "pad_token_id": get_token_id(fields, "pad_token_id", 0),
        "dtype": get_dtype(fields),
        "weight_kind": get_weight_kind(fields),
    }
