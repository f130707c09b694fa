"""Tensor names of the published layouts, and the one name each tensor has here (transformers')."""

from __future__ import annotations

from typing import Final

EMBEDDING: Final = "backbone.embeddings.weight"
LM_HEAD: Final = "lm_head.weight"


def canonical_name(name: str) -> str:
    """The name of file tensor ``name`` in this package.

    Raw state-spaces files say ``backbone.embedding`` (singular), and some exports ``model.`` for ``backbone.``
    (Jamba too: ``model.layers.{i}.mamba.`` here becomes ``backbone.layers.{i}.mamba.``).
    """
    if name.startswith("model."):
        name = f"backbone.{name.removeprefix('model.')}"
    return EMBEDDING if name == "backbone.embedding.weight" else name
