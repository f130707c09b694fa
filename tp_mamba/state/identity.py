"""Which model a state belongs to: a sentence that a file can carry, and its digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from tp_mamba.state.store import StackedState

_NOT_OF_A_STATE = ("dtype", "bos_token_id", "eos_token_ids", "pad_token_id", "usable_vocab_size")
"""Fields of a configuration that change no state, or (dtype) only its rounding."""


def describe_config(config: Any) -> str:
    """The fields of a configuration, a dataclass, that decide what a state means, those at their defaults left out."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.compare and field.name not in _NOT_OF_A_STATE
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return ", ".join(f"{name}={value}" for name, value in fields.items() if value != defaults[name])


def fingerprint(model: str, stacked: Iterable[StackedState]) -> str:
    """A digest of ``model`` (see :func:`describe_config`) and of what its layers keep, dtypes aside."""
    layout = [[each.name, each.layers, each.spec.shape, each.spec.dim] for each in stacked]
    return hashlib.sha256(json.dumps([model, layout]).encode()).hexdigest()
