"""Kept prefixes on the disk: one state file per snapshot, which any number of ranks can read, and an index."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from tp_mamba.checkpoint.atomic import replacing_file
from tp_mamba.state.cache import MambaCache
from tp_mamba.state.prefix import PrefixCache

_INDEX = "prefixes.json"
_FORMAT = "tp-mamba prefixes 1"
_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")


def save_prefixes(prefixes: PrefixCache, cache: MambaCache, folder: str | os.PathLike[str]) -> int:
    """Write every snapshot, all of which lie in ``cache``, into ``folder``; every rank calls this.

    A file is named by the digest of its tokens, and names its model itself. The index is written last, so at every
    moment it names whole files only; files of an older index that it no longer names are removed after that.

    Returns:
        How many snapshots were written.

    Raises:
        OSError: a file cannot be written; ``folder`` still holds the older index.
        RankFailedError: rank 0 could not write it.
    """
    folder = Path(folder)
    with cache.tp.agreed():
        if cache.tp.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for tokens, snapshot in prefixes.snapshots():
        cache.save(folder / _name(tokens), snapshot.slot)
        entries.append({"count": snapshot.count, "tokens": tokens.tolist()})
    with cache.tp.agreed():
        if cache.tp.rank == 0:
            with replacing_file(folder / _INDEX) as partial:
                partial.write_text(json.dumps({"format": _FORMAT, "snapshots": entries}), encoding="utf-8")
            named = {_name(np.asarray(entry["tokens"], np.int64)) for entry in entries}
            for path in folder.iterdir():
                if _FILE.fullmatch(path.name) and path.name not in named:
                    path.unlink()
    return len(entries)


def load_prefixes(prefixes: PrefixCache, cache: MambaCache, folder: str | os.PathLike[str]) -> int:
    """Take the snapshots of ``folder`` into ``prefixes``, whose slots are those of ``cache``; every rank calls this.

    Where it holds more than fit, those used last are taken. The number of ranks may be another than it was saved with.

    Returns:
        How many were taken.

    Raises:
        ValueError: the index is missing or damaged, or a state file is missing, damaged or of another model; the
            snapshots before it are taken.
        RankFailedError: another rank could not read its part.
    """
    folder = Path(folder)
    with cache.tp.agreed():
        entries = _read_index(folder / _INDEX)
    taken = 0
    for tokens in entries[-prefixes.capacity :]:
        if not (cache.num_free or prefixes.drop_oldest()):
            break
        slot = cache.allocate()
        try:
            cache.load(folder / _name(np.asarray(tokens, np.int64)), slot)
        except BaseException:
            cache.free(slot)
            raise
        prefixes.give(tokens, slot)
        taken += 1
    return taken


def _name(tokens: np.ndarray) -> str:
    return f"{hashlib.sha256(np.ascontiguousarray(tokens, '<i8').tobytes()).hexdigest()}.safetensors"


def _read_index(path: Path) -> list[list[int]]:
    """The token ids of every snapshot, the least recently used first."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != _FORMAT:
            raise ValueError(f"its format is {index['format']!r}")
        entries = [[int(token) for token in entry["tokens"]] for entry in index["snapshots"]]
        if [len(tokens) for tokens in entries] != [entry["count"] for entry in index["snapshots"]]:
            raise ValueError("its counts are not those of its tokens")
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise ValueError(
            f"{path} is no readable index of kept prefixes ({failure}): give a folder that was written by save_prefixes"
        ) from failure
    return entries
