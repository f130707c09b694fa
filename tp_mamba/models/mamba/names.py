"""Tensor names of Mamba and FalconMamba checkpoints, as published and as other programs export them."""

from __future__ import annotations

from typing import Final

from tp_mamba.models.names import EMBEDDING

# What the model without its head calls its three parts.
_BASE_MODEL: Final = ("layers.", "norm_f.", "embeddings.", "embedding.")


def our_name(name: str) -> str:
    """The parameter that file tensor ``name`` fills.

    Raw state-spaces files say ``backbone.embedding`` (singular); some exports say ``model.`` for ``backbone.``;
    transformers' base class, the model without its head, leaves ``backbone.`` out.
    """
    if name.startswith("model."):
        name = f"backbone.{name.removeprefix('model.')}"
    elif name.startswith(_BASE_MODEL):
        name = f"backbone.{name}"
    return EMBEDDING if name == "backbone.embedding.weight" else name
