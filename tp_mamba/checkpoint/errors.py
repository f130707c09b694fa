"""The errors of reading and writing checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one sentence with the rule and the remedy."""


class ConfigError(CheckpointError):
    """A configuration does not describe a Mamba-1 model that this package can run."""


class CheckpointWriteError(OSError, CheckpointError):
    """A checkpoint could not be written; what stood at its place before still does."""
