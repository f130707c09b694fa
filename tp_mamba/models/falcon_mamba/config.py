"""config.json of FalconMamba: Mamba's keys and the epsilon of the norms of dt, B and C.

As transformers 5.23 reads it (``models/falcon_mamba/configuration_falcon_mamba.py``). The published file says
``expand`` 16 beside the true ``intermediate_size`` 8192 = 2 * 4096: the explicit size decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tp_mamba.models.config import MambaConfig
from tp_mamba.models.fields import get_field
from tp_mamba.models.mamba.config import SHARED_KEYS, parse_shared, render_shared


def parse(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :class:`MambaConfig` from a ``config.json`` of ``model_type`` falcon_mamba.

    Required keys and defaults are Mamba's (:func:`tp_mamba.models.mamba.config.parse`); ``mixer_rms_eps`` is 1e-6
    where it is absent. ``expand`` travels in ``extra``: the published one is kept as it is.

    Raises:
        ConfigError: a required field is missing, one has the wrong type, or the layers are not Mamba-1.
    """
    return parse_shared(fields, SHARED_KEYS | {"mixer_rms_eps"}) | {
        "mixer_norm": "weightless",
        "mixer_rms_eps": get_field(fields, "mixer_rms_eps", float, 1e-6),
    }


def render(config: MambaConfig) -> dict[str, Any]:
    """The content of a ``config.json`` in transformers' dialect."""
    rendered = render_shared(config, "FalconMambaForCausalLM")
    return rendered | {"mixer_rms_eps": config.mixer_rms_eps} | dict(config.extra)
