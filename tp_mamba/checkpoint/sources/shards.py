"""Tensors of a folder of per-rank files, read as if they were whole.

A manifest (:data:`tp_mamba.checkpoint.files.MANIFEST`) says how each tensor was cut for ``m`` ranks. File
``model-tp-0000r-of-0000m.safetensors`` holds rank ``r``'s rows of every cut tensor, without padding and part
after part, and a copy of every tensor that is not cut.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import MANIFEST
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.checkpoint.sources.safetensors import DTYPES, SafetensorsSource
from tp_mamba.parallel.sharding import Shard

FORMAT: Final = "tp_mamba_shards"
VERSION: Final = 2
_AGAIN: Final = "make the shards again with tp-mamba shard"


def shard_file_name(rank: int, n: int) -> str:
    """Name of rank ``rank``'s file of ``n``; counted from 1 as Hugging Face does."""
    return f"model-tp-{rank + 1:05d}-of-{n:05d}.safetensors"


def local_shape(shard: Shard, rank: int, n: int) -> tuple[int, ...]:
    """Shape of ``rank``'s rows without padding, as its file holds them."""
    if shard.dim is None:
        return shard.shape
    rows = sum(span.stop - span.start for span in shard.spans(rank, n))
    return (*shard.shape[: shard.dim], rows, *shard.shape[shard.dim + 1 :])


class ShardedSource(TensorSource):
    """A folder of per-rank files made for ``m`` ranks, serving a rank of any group size ``n``.

    Where ``n == m``, rank ``r`` opens only its own file; else the files whose rows it needs.
    """

    def __init__(self, folder: Path, *, rank: int = 0, size: int = 1) -> None:
        """Read the manifest, and the headers of the files that ``rank`` of ``size`` needs.

        Raises:
            CheckpointError: the manifest is damaged or of another version, or a needed file is missing,
                damaged, or does not hold what the manifest says.
        """
        super().__init__()
        self._folder = folder
        self._tp_size, self._shards, self._dtypes = _read_manifest(folder / MANIFEST)
        self._own = rank % self._tp_size
        self._files: dict[int, SafetensorsSource] = {self._own: self._open(self._own)}
        for shard in self._shards.values():
            if shard.dim is None:
                continue
            for span in shard.spans(rank, size):
                for owner, *_ in self._owners(shard, span.start, span.stop):
                    if owner not in self._files:
                        self._files[owner] = self._open(owner)

    def names(self) -> list[str]:
        return sorted(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """As :meth:`TensorSource.read`; the rank given at opening must hold those rows, or part of them.

        Raises:
            CheckpointError: a cut tensor is asked for along another dimension than it was cut along.
        """
        shard = self._shards[name]
        if start == stop:
            return self._empty(name, dim)
        if shard.dim is None:
            return self._fetch(self._own, name, dim, start, stop)
        if dim != shard.dim and (start, stop) != (0, shard.shape[dim]):
            raise CheckpointError(
                f"{name} was cut along dimension {shard.dim} and rows {start} to {stop} of dimension {dim} are asked "
                "for: merge the files first, with tp-mamba merge"
            )
        first, last = (start, stop) if dim == shard.dim else (0, shard.shape[shard.dim])
        pieces = [
            self._fetch(owner, name, shard.dim, a, b) for owner, a, b in self._owners(shard, first, last)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=shard.dim)

    def _owners(self, shard: Shard, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Where ``full[start:stop]`` lies, in order: ``(file, first row, row after the last)`` of each piece."""
        pieces = []
        for owner in range(self._tp_size):
            offset = 0
            for span in shard.spans(owner, self._tp_size):
                first, last = max(start, span.start), min(stop, span.stop)
                if first < last:
                    pieces.append((first, owner, offset + first - span.start, offset + last - span.start))
                offset += span.stop - span.start
        return [(owner, first, last) for _, owner, first, last in sorted(pieces)]

    def _fetch(self, owner: int, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        tensor = self._files[owner].read(name, dim, start, stop)
        self.bytes_read += tensor.nbytes
        return tensor

    def _open(self, owner: int) -> SafetensorsSource:
        path = self._folder / shard_file_name(owner, self._tp_size)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: copy it here, or {_AGAIN}")
        file = SafetensorsSource([path], remedy="make it again with tp-mamba shard")
        if file.names() != self.names():
            odd = sorted(set(file.names()) ^ set(self.names()))[0]
            raise CheckpointError(f"{path} and {MANIFEST} do not agree on {odd}: {_AGAIN}")
        for name, shard in self._shards.items():
            expected = local_shape(shard, owner, self._tp_size)
            if file.shape(name) != expected or file.dtype(name) != self._dtypes[name]:
                raise CheckpointError(
                    f"{name} in {path} is {list(file.shape(name))} {file.dtype(name)}, {MANIFEST} says "
                    f"{list(expected)} {self._dtypes[name]}: {_AGAIN}"
                )
        return file


def manifest(tp_size: int, shards: dict[str, Shard], dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """The content of the manifest of tensors cut as ``shards`` for ``tp_size`` ranks."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "tp_size": tp_size,
        "tensors": {
            name: {
                "shape": list(shard.shape),
                "dim": shard.dim,
                "pieces": list(shard.pieces),
                "granularity": shard.granularity,
                "dtype": codes[dtypes[name]],
            }
            for name, shard in shards.items()
        },
    }


def _read_manifest(path: Path) -> tuple[int, dict[str, Shard], dict[str, torch.dtype]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): {_AGAIN}") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{path} is not a {FORMAT} manifest of version {VERSION}: {_AGAIN}")
    try:
        shards = {
            name: Shard(
                shape=tuple(entry["shape"]),
                dim=entry["dim"],
                pieces=tuple(entry["pieces"]),
                granularity=entry["granularity"],
            )
            for name, entry in content["tensors"].items()
        }
        dtypes = {name: DTYPES[entry["dtype"]] for name, entry in content["tensors"].items()}
        tp_size = content["tp_size"]
        sound = isinstance(tp_size, int) and tp_size >= 1 and all(map(_is_sound, shards.values()))
    except (KeyError, TypeError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} is damaged: {_AGAIN}")
    return tp_size, shards, dtypes


def _is_sound(shard: Shard) -> bool:
    return all(isinstance(size, int) and size >= 0 for size in shard.shape)
