"""What a folder of per-rank files says about itself: in its manifest, and in the header of every file.

The manifest says how each tensor was cut and carries a random id of the writing; each file says which rank's it is, of
how many, and of which writing. So files in the wrong order, or of two writings, are noticed when they are opened.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import MANIFEST
from tp_mamba.checkpoint.json_file import read_json_object
from tp_mamba.checkpoint.sources.safetensors import CODES, DTYPES
from tp_mamba.parallel.sharding import Shard
from tp_mamba.quoting import quoted, shown_path

FORMAT: Final = "tp_mamba_shards"
VERSION: Final = 2
AGAIN: Final = "make the shards again with tp-mamba shard"

_MAX_PARTS: Final = 64
"""Pieces per tensor in a manifest of version 1, which gave only their number; it wrote 1 and 2."""


def shard_file_name(rank: int, n: int) -> str:
    """Name of rank ``rank``'s file of ``n``; counted from 1 as Hugging Face does."""
    return f"model-tp-{rank + 1:05d}-of-{n:05d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """How the tensors of a folder of per-rank files were cut, and by which writing."""

    tp_size: int
    shards: Mapping[str, Shard]
    dtypes: Mapping[str, torch.dtype]
    writing: str | None = field(default_factory=lambda: uuid.uuid4().hex)
    """Random id of the writing; None in a folder of version 1, whose files do not say which they are."""

    def to_dict(self) -> dict[str, Any]:
        """The content of the manifest's file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tp_size": self.tp_size,
            "writing": self.writing,
            "tensors": {
                name: {
                    "shape": list(shard.shape),
                    "dim": shard.dim,
                    "pieces": list(shard.pieces),
                    "granularity": shard.granularity,
                    "dtype": CODES[self.dtypes[name]],
                }
                for name, shard in self.shards.items()
            },
        }

    def stamp(self, rank: int) -> dict[str, str]:
        """What the header of rank ``rank``'s file says about it."""
        return {"rank": str(rank), "size": str(self.tp_size), "writing": str(self.writing)}

    def check_stamp(self, path: Path, rank: int, metadata: Mapping[str, str]) -> None:
        """Make sure that the file ``path``, with ``metadata`` in its header, is rank ``rank``'s of this writing.

        Files of version 1 bear no stamp, and neither their order nor their writing can be checked.

        Raises:
            CheckpointError: it is another rank's, of another number of ranks, or of another writing.
        """
        found = {key: metadata.get(key) for key in ("rank", "size", "writing")}
        if self.writing is None and not any(found.values()):
            return
        if None in found.values():
            raise CheckpointError(
                f"{shown_path(path)} does not say which rank's file it is, as {MANIFEST} would have it: {AGAIN}"
            )
        expected = self.stamp(rank)
        if (found["rank"], found["size"]) != (expected["rank"], expected["size"]):
            raise CheckpointError(
                f"{shown_path(path)} is the file of rank {quoted(found['rank'])} of {quoted(found['size'])}, and its "
                f"name is that of rank '{rank}' of '{self.tp_size}': give the files their own names back, or {AGAIN}"
            )
        if found["writing"] != expected["writing"]:
            raise CheckpointError(
                f"{shown_path(path)} is not of the same run of tp-mamba shard as {MANIFEST}: copy all files of one "
                f"run, or {AGAIN}"
            )


def read_manifest(path: Path) -> Manifest:
    """The manifest in the file ``path``, of version 1 or 2.

    Sizes are what the file claims: they are held against the headers of the files before anything is done with them.

    Raises:
        CheckpointError: it is not JSON, not a manifest, of another version, or damaged.
    """
    content = read_json_object(path, remedy=AGAIN)
    version = content.get("version")
    if content.get("format") != FORMAT or version not in (1, VERSION) or isinstance(version, bool):
        raise CheckpointError(
            f"{shown_path(path)} is not a {FORMAT} manifest of version {VERSION} or 1: {AGAIN}"
        )
    try:
        tensors = content["tensors"].items()
        tp_size = _at_least(1, content["tp_size"])
        writing = content["writing"] if version == VERSION else None
        shards = {name: _shard(entry, version) for name, entry in tensors}
        dtypes = {name: DTYPES[entry["dtype"]] for name, entry in tensors}
        if version == VERSION and not (isinstance(writing, str) and writing):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{shown_path(path)} is damaged: {AGAIN}") from None
    return Manifest(tp_size=tp_size, shards=shards, dtypes=dtypes, writing=writing)


def _shard(entry: Mapping[str, Any], version: int) -> Shard:
    shape, dim = tuple(_at_least(0, size) for size in entry["shape"]), entry["dim"]
    if dim is None:
        return Shard(shape=shape)
    if version == VERSION:
        pieces = tuple(_at_least(0, size) for size in entry["pieces"])
        return Shard(
            shape=shape, dim=_at_least(0, dim), pieces=pieces, granularity=_at_least(1, entry["granularity"])
        )
    parts = _at_least(1, entry["parts"])
    size = shape[dim] if _at_least(0, dim) < len(shape) else 0
    if parts > _MAX_PARTS or size % parts:
        raise ValueError
    return Shard(shape=shape, dim=dim, pieces=(size // parts,) * parts)


def _at_least(least: int, value: object) -> int:
    """``value`` if it is a whole number from ``least``; else ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError
    return value
