"""The part of transformers' config.json that is the same in every family, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Final

from tp_mamba.layers.weights import DENSE
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.fields import (
    QUANTIZATION_KEYS,
    dtype_name,
    get_dtype,
    get_field,
    get_token_id,
    get_token_ids,
    get_weight_kind,
)

COMMON_KEYS: Final = frozenset(
    {
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
)
"""Read under these names and written back from the configuration."""


def parse_common(
    fields: Mapping[str, Any],
    *,
    known: Set[str],
    tied: bool,
    bos: int,
    eos: int,
    pad: int,
) -> dict[str, Any]:
    """Keyword arguments of :class:`MambaConfig` for the common keys.

    Args:
        known: the family's own keys, which are written back from the configuration too; all other keys travel in
            ``extra``.
        tied, bos, eos, pad: what the family takes an absent ``tie_word_embeddings`` or token id for.

    Raises:
        ConfigError: a required key is missing, or one has the wrong type.
    """
    return {
        "model_type": fields["model_type"],
        "hidden_size": get_field(fields, "hidden_size", int),
        "num_hidden_layers": get_field(fields, "num_hidden_layers", int),
        "vocab_size": get_field(fields, "vocab_size", int),
        "usable_vocab_size": get_field(fields, "usable_vocab_size", int, None),
        "hidden_act": get_field(fields, "hidden_act", str, "silu"),
        "tie_word_embeddings": get_field(fields, "tie_word_embeddings", bool, tied),
        "bos_token_id": get_token_id(fields, "bos_token_id", bos),
        "eos_token_ids": get_token_ids(fields, "eos_token_id", eos),
        "pad_token_id": get_token_id(fields, "pad_token_id", pad),
        "dtype": get_dtype(fields),
        "weight_kind": get_weight_kind(fields),
        "extra": {key: value for key, value in fields.items() if key not in COMMON_KEYS | known},
    }


def render_common(config: MambaConfig, architecture: str) -> dict[str, Any]:
    """The common keys for ``config``; ``architecture`` is transformers' class.

    The caller adds its family's keys, and then ``config.extra``.
    """
    eos: int | list[int] | None = list(config.eos_token_ids) or None
    if len(config.eos_token_ids) == 1:
        eos = config.eos_token_ids[0]
    rendered: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
    }
    if config.usable_vocab_size is not None:
        rendered["usable_vocab_size"] = config.usable_vocab_size
    if config.dtype is not None:
        rendered["dtype"] = dtype_name(config.dtype)
    if config.weight_kind != DENSE and not any(key in config.extra for key in QUANTIZATION_KEYS):
        rendered["quantization_config"] = {"quant_method": config.weight_kind}
    return rendered
