"""Opening whatever holds the weights of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from tp_mamba.checkpoint.files import refuse_adapter
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.checkpoint.sources.bin import BinSource
from tp_mamba.checkpoint.sources.candidates import Layout, find_weights
from tp_mamba.checkpoint.sources.safetensors import SafetensorsSource
from tp_mamba.checkpoint.sources.shards import ShardedSource

__all__ = ["TensorSource", "open_source"]


def open_source(folder: str | Path, *, rank: int = 0, size: int = 1) -> TensorSource:
    """The weights in ``folder``; headers are read, no weight is.

    Which files those are: :func:`tp_mamba.checkpoint.sources.candidates.find_weights`.

    Args:
        rank, size: who will read, so that of per-rank files only the needed ones are opened.

    Raises:
        CheckpointError: there are no weights, or there are two sets of them; a file is missing or damaged; an index is
            not to be trusted; or an adapter stands beside the weights.
    """
    folder = Path(folder)
    refuse_adapter(folder)
    found = find_weights(folder)
    match found.layout:
        case Layout.SHARDS:
            return ShardedSource(folder, rank=rank, size=size)
        case Layout.SAFETENSORS:
            return SafetensorsSource(found.files, found.weight_map)
        case Layout.BIN:
            return BinSource(found.files, found.weight_map)
