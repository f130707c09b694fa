"""Tensors of a folder of per-rank files, read as if they were whole.

A manifest (:data:`tp_mamba.checkpoint.files.MANIFEST`) says how each tensor was cut for ``m`` ranks. File
``model-tp-0000r-of-0000m.safetensors`` holds rank ``r``'s rows of every cut tensor, without padding and piece
after piece, and a copy of every tensor that is not cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import MANIFEST
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.checkpoint.sources.manifest import AGAIN, read_manifest, shard_file_name
from tp_mamba.checkpoint.sources.safetensors import SafetensorsSource
from tp_mamba.parallel.sharding import Shard
from tp_mamba.quoting import quoted, shown, shown_path


def local_shape(shard: Shard, rank: int, n: int) -> tuple[int, ...]:
    """Shape of ``rank``'s rows without padding, as its file holds them."""
    if shard.dim is None:
        return shard.shape
    rows = sum(span.stop - span.start for span in shard.spans(rank, n))
    return (*shard.shape[: shard.dim], rows, *shard.shape[shard.dim + 1 :])


class ShardedSource(TensorSource):
    """A folder of per-rank files made for ``m`` ranks, serving a rank of any group size ``n``.

    Where ``n == m``, rank ``r`` opens only its own file; else the files whose rows it needs. Each file is checked to
    be the one that its name says, of the manifest's writing; in folders of version 1, whose files do not say that, only
    names, shapes and dtypes are.
    """

    names_are_ours = True

    def __init__(self, folder: Path, *, rank: int = 0, size: int = 1) -> None:
        """Read the manifest, and the headers of the files that ``rank`` of ``size`` needs.

        Raises:
            CheckpointError: the manifest is damaged or of another version, or a needed file is missing, damaged, of
                another rank or writing, or does not hold what the manifest says.
        """
        super().__init__()
        self._folder = folder
        self._manifest = read_manifest(folder / MANIFEST)
        self._tp_size, self._shards = self._manifest.tp_size, self._manifest.shards
        self._own = rank % self._tp_size
        self._files: dict[int, SafetensorsSource] = {self._own: self._open(self._own)}
        if size == self._tp_size:
            return
        for shard in self._shards.values():
            for span in [] if shard.dim is None else shard.spans(rank, size):
                for owner, *_ in self._owners(shard, span.start, span.stop):
                    if owner not in self._files:
                        self._files[owner] = self._open(owner)

    def names(self) -> list[str]:
        return sorted(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._manifest.dtypes[name]

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
                f"{shown(name)} was cut along dimension {shard.dim} and rows {start} to {stop} of dimension {dim} are "
                "asked for: merge the files first, with tp-mamba merge"
            )
        first, last = (start, stop) if dim == shard.dim else (0, shard.shape[shard.dim])
        pieces = [
            self._fetch(owner, name, shard.dim, a, b) for owner, a, b in self._owners(shard, first, last)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=shard.dim)

    def _owners(self, shard: Shard, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where ``full[start:stop]`` lies, in order: ``(file, first row, row after the last)`` of each run of rows.

        One at a time, so that whoever opens the files stops at the first that is not there, however many ranks the
        manifest claims.
        """
        begin = 0
        for piece, (size, share) in enumerate(zip(shard.pieces, shard.spans(0, self._tp_size), strict=True)):
            first, last = max(start, begin), min(stop, begin + size)
            rows = share.stop - share.start  # of each rank's share, but the last ranks', which may be shorter
            for owner in (
                range((first - begin) // rows, (last - 1 - begin) // rows + 1) if first < last else ()
            ):
                spans = shard.spans(owner, self._tp_size)
                offset = sum(span.stop - span.start for span in spans[:piece]) - spans[piece].start
                yield owner, offset + max(first, spans[piece].start), offset + min(last, spans[piece].stop)
            begin += size

    def _fetch(self, owner: int, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        tensor = self._files[owner].read(name, dim, start, stop)
        self.bytes_read += tensor.nbytes
        return tensor

    def _open(self, owner: int) -> SafetensorsSource:
        path = self._folder / shard_file_name(owner, self._tp_size)
        if not path.is_file():
            raise CheckpointError(f"{shown_path(path)} is missing: copy it here, or {AGAIN}")
        file = SafetensorsSource([path], remedy="make it again with tp-mamba shard")
        self._manifest.check_stamp(path, owner, file.metadata(path))
        if file.names() != self.names():
            odd = sorted(set(file.names()) ^ set(self.names()))[0]
            raise CheckpointError(f"{shown_path(path)} and {MANIFEST} do not agree on {shown(odd)}: {AGAIN}")
        for name, shard in self._shards.items():
            expected = local_shape(shard, owner, self._tp_size)
            if file.shape(name) != expected or file.dtype(name) != self.dtype(name):
                raise CheckpointError(
                    f"{shown(name)} in {shown_path(path)} is {quoted(list(file.shape(name)))} {file.dtype(name)}, "
                    f"{MANIFEST} says {quoted(list(expected))} {self.dtype(name)}: {AGAIN}"
                )
        return file
