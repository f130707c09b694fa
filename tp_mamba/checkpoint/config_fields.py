"""Typed access to the fields of a config.json; a wrong one is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from tp_mamba.checkpoint.errors import ConfigError

DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

CORRECT_IT: Final = "correct it, or take the config.json that belongs to the weights"

_KINDS: Final = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
}

_REQUIRED: Final = object()


def get_field(fields: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """``fields[key]`` of type ``kind`` (integers pass as floats, booleans never as numbers); null is absent."""
    value = fields.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ConfigError(
                f"the field {key} is missing and has no default: add it, or take the config.json that "
                "belongs to the weights"
            )
        return default
    if kind is float:
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    else:
        sound = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not sound:
        raise ConfigError(f"{key} is {value!r}, it must be {_KINDS[kind]}: {CORRECT_IT}")
    return value


def get_rank(fields: Mapping[str, Any], key: str, hidden_size: int) -> int:
    """R: a number, or ``"auto"`` for ceil(H / 16)."""
    if fields.get(key, "auto") == "auto":
        return math.ceil(hidden_size / 16)
    return int(get_field(fields, key, int))


def get_token_id(fields: Mapping[str, Any], key: str, default: int) -> int | None:
    """The id, the family's default where the key is absent, None where it is null."""
    return get_field(fields, key, int, None) if key in fields else default


def get_token_ids(fields: Mapping[str, Any], key: str, default: int) -> tuple[int, ...]:
    """An id or a list of ids, as transformers allows for ends of text; null is none."""
    value = fields.get(key, default)
    if not isinstance(value, list):
        value = [] if get_token_id({key: value}, key, default) is None else [value]
    return tuple(get_field({key: item}, key, int) for item in value)


def get_dtype(fields: Mapping[str, Any]) -> torch.dtype | None:
    """The declared dtype: ``dtype``, or ``torch_dtype`` in files before transformers 5; None if there is none."""
    name = fields.get("dtype", fields.get("torch_dtype"))
    if name in (None, "auto"):
        return None
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise ConfigError(
            f"dtype is {name!r}, supported are {', '.join(DTYPES)}: name the one the weights are stored in, or convert "
            "them to one of these"
        )
    return DTYPES[name.removeprefix("torch.")]
