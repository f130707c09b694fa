"""The errors of reading and writing checkpoints."""

from __future__ import annotations

from tp_mamba.errors import CheckpointError, ConfigError

__all__ = ["CheckpointError", "CheckpointWriteError", "ConfigError"]


class CheckpointWriteError(OSError, CheckpointError):
    """A checkpoint could not be written; what stood at its place before still does."""
