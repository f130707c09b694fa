"""Typed access to the fields of a config.json, for the parsers of the families; a wrong field is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from tp_mamba.errors import ConfigError
from tp_mamba.kernels.common.dtypes import DTYPES
from tp_mamba.layers.weights import DENSE, weight_kinds
from tp_mamba.quoting import quoted

QUANTIZATION_KEYS: Final = ("quantization_config", "compression_config")
"""Where a config.json says that its weights are quantised."""

CORRECT_IT: Final = "correct it, or take the config.json that belongs to the weights"
"""The remedy for a field that is damaged."""

USE_MAMBA_1: Final = "give a checkpoint of a pure Mamba-1 model"
"""The remedy for a field that says what this package does not run."""

_KINDS: Final = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
}

_REQUIRED: Final = object()


def get_field(fields: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """``fields[key]``, which must be of type ``kind``; null counts as absent.

    Whole numbers pass as floats, booleans never as numbers.

    Args:
        default: what an absent field stands for; without one the field is required.

    Raises:
        ConfigError: the field is required and absent, or of another type.
    """
    value = fields.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ConfigError(
                f"the field {key} is missing and has no default: add it, or take the config.json that "
                "belongs to the weights"
            )
        return default
    if not _is_a(value, kind):
        raise ConfigError(f"{key} is {quoted(value)}, it must be {_KINDS[kind]}: {CORRECT_IT}")
    return value


def get_rank(fields: Mapping[str, Any], key: str, hidden_size: int) -> int:
    """R: a number, or ``"auto"`` for ceil(H / 16).

    Raises:
        ConfigError: it is something else.
    """
    if fields.get(key, "auto") == "auto":
        return -(-hidden_size // 16)
    return int(get_field(fields, key, int))


def get_width(fields: Mapping[str, Any], key: str, hidden_size: int) -> int:
    """D from the expansion factor under ``key``, 2 where it is absent: ``int(factor * H)``.

    Raises:
        ConfigError: the factor is no finite number, or the product is none.
    """
    factor = get_field(fields, key, float, 2)
    try:
        return int(factor * hidden_size)
    except OverflowError:
        raise ConfigError(f"{key} is {quoted(factor)}, which is no width of a layer: {CORRECT_IT}") from None


def get_token_id(fields: Mapping[str, Any], key: str, default: int) -> int | None:
    """The id, the family's default where the key is absent, None where it is null.

    Raises:
        ConfigError: it is something else.
    """
    return get_field(fields, key, int, None) if key in fields else default


def get_token_ids(fields: Mapping[str, Any], key: str, default: int) -> tuple[int, ...]:
    """An id or a list of ids, as transformers allows for ends of text; null is none.

    Raises:
        ConfigError: it is something else.
    """
    value = fields.get(key, default)
    if not isinstance(value, list):
        value = [] if get_token_id({key: value}, key, default) is None else [value]
    return tuple(get_field({key: item}, key, int) for item in value)


def get_dtype(fields: Mapping[str, Any]) -> torch.dtype | None:
    """The declared dtype: ``dtype``, or ``torch_dtype`` in files before transformers 5; None if there is none.

    Raises:
        ConfigError: it is none that is supported.
    """
    name = fields.get("dtype", fields.get("torch_dtype"))
    if name in (None, "auto"):
        return None
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise ConfigError(
            f"dtype is {quoted(name)}, supported are {', '.join(DTYPES)}: name the one the weights are stored in, or "
            "convert them to one of these"
        )
    return DTYPES[name.removeprefix("torch.")]


def get_weight_kind(fields: Mapping[str, Any]) -> str:
    """The kind of the weights: ``quantization_config.quant_method``, ``"dense"`` where nothing is quantised.

    Raises:
        ConfigError: no kind of that name is registered (:func:`tp_mamba.layers.weights.register_weight_kind`).
    """
    # Checkpoints of compressed-tensors before 2025 have the second name; transformers reads both.
    key = next((key for key in QUANTIZATION_KEYS if fields.get(key) is not None), None)
    if key is None:
        return DENSE
    method = get_field(fields, key, dict).get("quant_method")
    if isinstance(method, str) and method in weight_kinds():
        return method
    how = (
        "weights quantised in a way that it does not name" if method is None else f"{quoted(method)} weights"
    )
    raise ConfigError(
        f"{key} declares {how}, and supported are {', '.join(weight_kinds())}: give the checkpoint that was quantised, "
        "or dequantise this one with the program that made it"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of ``dtype`` in a config.json."""
    return str(dtype).removeprefix("torch.")


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float and isinstance(value, int):
        return value.bit_length() < 1024  # the largest finite double is below 2 ** 1024
    return isinstance(value, kind) and (not isinstance(value, float) or math.isfinite(value))
