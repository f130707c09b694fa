"""FalconMamba: Mamba with an RMSNorm without weights on dt, B and C; its tensors are named as Mamba's."""

from __future__ import annotations

from typing import Final

from tp_mamba.models.block import MambaBlock
from tp_mamba.models.falcon_mamba.config import parse, render
from tp_mamba.models.mamba.names import our_name
from tp_mamba.models.registry import Family

FALCON_MAMBA: Final = Family(
    model_type="falcon_mamba",
    parse=parse,
    render=render,
    our_name=our_name,
    build_block=MambaBlock,
)
