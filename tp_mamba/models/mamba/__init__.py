"""Mamba: the -hf checkpoints, and the original ones of state-spaces, whose config.json is another dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tp_mamba.models.block import MambaBlock
from tp_mamba.models.mamba.config import parse, render
from tp_mamba.models.mamba.names import our_name
from tp_mamba.models.mamba.raw_config import is_raw, parse_raw
from tp_mamba.models.registry import Family


def _recognises(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") == "mamba" or is_raw(fields)


def _parse(fields: Mapping[str, Any]) -> dict[str, Any]:
    return parse_raw(fields) if is_raw(fields) else parse(fields)


MAMBA: Final = Family(
    model_type="mamba",
    recognises=_recognises,
    parse=_parse,
    render=render,
    our_name=our_name,
    build_block=MambaBlock,
)
