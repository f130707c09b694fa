"""Writing a safetensors file tensor by tensor, so that one tensor at a time is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from tp_mamba.checkpoint.sources.safetensors import CODES

Spec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor's data."""
    dtype, shape = spec
    return prod(shape) * dtype.itemsize


def write_order(specs: Mapping[str, Spec]) -> list[str]:
    """The order of tensors in a file: widest dtype first, so that every tensor starts at a multiple of its width."""
    return sorted(specs, key=lambda name: -specs[name][0].itemsize)


class SafetensorsWriter:
    """A file whose tensors are announced at once and written one after the other, in :func:`write_order`.

    A context manager: leaving it flushes the data to the disk, where a full disk is found out.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Create the file and write its header.

        Args:
            metadata: what the header says about the file besides ``"format": "pt"``.

        Raises:
            OSError: the file cannot be written.
        """
        # transformers refuses files that do not name their format.
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name in write_order(specs):
            dtype, shape = specs[name]
            end = offset + nbytes(specs[name])
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._specs, self._pending = specs, iter(write_order(specs))
        self._file = path.open("wb")
        try:
            self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        except OSError:
            self._file.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append ``tensor``, a CPU tensor of the announced dtype and shape.

        Raises:
            OSError: the data cannot be written.
            ValueError: another tensor, dtype or shape was announced here.
        """
        expected = next(self._pending, None)
        if name != expected or (tensor.dtype, tuple(tensor.shape)) != self._specs[name]:
            raise ValueError(
                f"got {name} {tensor.dtype} {list(tensor.shape)}, announced is {expected} "
                f"{self._specs[expected] if expected else ''}: write tensors as announced, in write_order"
            )
        if tensor.numel():
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
