"""Model families on one shared causal language model; importing this package registers those it holds."""

from __future__ import annotations

from tp_mamba.models.falcon_mamba import FALCON_MAMBA
from tp_mamba.models.jamba import JAMBA
from tp_mamba.models.mamba import MAMBA
from tp_mamba.models.registry import register_family

for _family in (MAMBA, FALCON_MAMBA, JAMBA):
    register_family(_family)
