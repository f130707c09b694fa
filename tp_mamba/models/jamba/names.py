"""Tensor names of Jamba checkpoints, of which only the Mamba layers are read."""

from __future__ import annotations


def our_name(name: str) -> str:
    """``model.layers.{i}.mamba.*`` as ``backbone.layers.{i}.mamba.*``, like every name inside the model."""
    return f"backbone.{name.removeprefix('model.')}" if name.startswith("model.") else name
