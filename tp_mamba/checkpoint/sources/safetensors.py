"""Tensors of safetensors files, read slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import refuse_lfs_pointer
from tp_mamba.checkpoint.sources.base import TensorSource, merge_listings
from tp_mamba.quoting import shown, shown_path

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of dtypes in a safetensors header."""

CODES: Final = {dtype: code for code, dtype in DTYPES.items()}
"""The other way round."""


class SafetensorsSource(TensorSource):
    """One safetensors file, or the several of an index; a slice is read without the rest of its tensor."""

    def __init__(
        self,
        files: Sequence[Path],
        weight_map: dict[str, Path] | None = None,
        *,
        remedy: str = "fetch it again",
    ) -> None:
        """Read the headers of ``files``.

        Args:
            weight_map: the index (tensor name to file), checked against the files.
            remedy: what to advise for a damaged file.

        Raises:
            CheckpointError: a file is damaged or a git-lfs pointer, or :func:`merge_listings` finds a disagreement.
        """
        super().__init__()
        opened = {path: _open(path, remedy) for path in files}
        self._metadata = {path: dict(file.metadata() or {}) for path, file in opened.items()}
        self._holder = merge_listings(
            [(path, list(file.keys())) for path, file in opened.items()], weight_map
        )
        self._slices = {name: opened[path].get_slice(name) for name, path in self._holder.items()}

    def metadata(self, path: Path) -> dict[str, str]:
        """What the header of the file ``path`` says about it, such as ``{"format": "pt"}``."""
        return self._metadata[path]

    def names(self) -> list[str]:
        return sorted(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self.dtype_name(name)
        if stored not in DTYPES:
            raise CheckpointError(
                f"{shown(name)} in {shown_path(self._holder[name])} has dtype {shown(stored)}, which is not supported: "
                "convert it to a float dtype"
            )
        return DTYPES[stored]

    def dtype_name(self, name: str) -> str:
        return str(self._slices[name].get_dtype())

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return self._empty(name, dim)
        try:
            tensor = self._slices[name][(slice(None),) * dim + (slice(start, stop),)]
        except Exception as error:  # the file was cut short meanwhile, or its disk fails
            raise CheckpointError(
                f"{shown(name)} cannot be read from {shown_path(self._holder[name])} ({shown(error)}): the file has "
                "changed since it was opened, or its disk fails"
            ) from error
        self.bytes_read += tensor.nbytes
        return tensor


def _open(path: Path, remedy: str) -> Any:
    refuse_lfs_pointer(path)
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # SafetensorError, OSError, and what a header of odd values may raise besides
        raise CheckpointError(
            f"{shown_path(path)} is not a whole safetensors file ({shown(error)}): it is truncated or damaged, {remedy}"
        ) from error
