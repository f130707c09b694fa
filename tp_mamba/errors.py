"""The errors that name a checkpoint or its config.json: at the bottom, for models and checkpoints both raise them."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one sentence with the rule and the remedy."""


class ConfigError(CheckpointError):
    """A configuration does not describe a Mamba-1 model that this package can run."""
