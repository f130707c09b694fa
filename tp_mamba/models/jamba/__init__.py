"""Jamba: the mixer of its Mamba layers, with weighted norms on dt, B and C. A whole model cannot be built here."""

from __future__ import annotations

from typing import Final

from tp_mamba.models.jamba.config import parse, render
from tp_mamba.models.jamba.names import our_name
from tp_mamba.models.registry import Family

JAMBA: Final = Family(model_type="jamba", parse=parse, render=render, our_name=our_name)
