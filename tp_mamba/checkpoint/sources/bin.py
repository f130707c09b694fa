"""Tensors of ``pytorch_model.bin`` files, mapped into memory and never executed."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import refuse_lfs_pointer
from tp_mamba.checkpoint.sources.base import TensorSource, merge_listings
from tp_mamba.checkpoint.sources.pickle_globals import foreign_call
from tp_mamba.quoting import quoted, shown, shown_path

_BEGINNINGS: Final = (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
"""How files of torch.save begin: a zip file, and before 2020 a pickled magic number."""

_SAVE_AGAIN: Final = "save the model's state_dict alone"


class BinSource(TensorSource):
    """One ``.bin`` file of torch.save, or the several of an index.

    Files are unpickled with ``weights_only=True``, which builds tensors and refuses everything else, and
    mapped, so that a slice touches its own pages only (the pre-2020 format, not a zip, is read whole).
    """

    def __init__(self, files: Sequence[Path], weight_map: dict[str, Path] | None = None) -> None:
        """Map ``files``.

        Args:
            weight_map: the index (tensor name to file), checked against the files.

        Raises:
            CheckpointError: a file is damaged or a git-lfs pointer, holds something other than named tensors, or
                :func:`merge_listings` finds a disagreement.
        """
        super().__init__()
        opened = {path: _open(path) for path in files}
        holder = merge_listings([(path, list(tensors)) for path, tensors in opened.items()], weight_map)
        self._tensors = {name: opened[path][name] for name, path in holder.items()}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name].narrow(dim, start, stop - start)
        self.bytes_read += tensor.nbytes
        return tensor


def _open(path: Path) -> dict[str, torch.Tensor]:
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    _refuse_compressed(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises nearly any exception type on a damaged file
        raise CheckpointError(f"{shown_path(path)} {_why_not_loaded(path)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{shown_path(path)} holds a {type(loaded).__name__}, it must be a dictionary of named tensors: "
            f"{_SAVE_AGAIN}"
        )
    for name, value in loaded.items():
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain:
            raise CheckpointError(
                f"{shown_path(path)} holds {quoted(name)} of type {type(value).__name__}, it must hold nothing but "
                f"named dense tensors: {_SAVE_AGAIN}"
            )
        if max(value.nbytes, value.untyped_storage().nbytes()) > size:
            raise CheckpointError(
                f"{shown_path(path)} of {size} bytes claims that {shown(name)} has shape {quoted(list(value.shape))}, "
                "more than it can hold: it is damaged, fetch it again"
            )
    return {name: value.detach() for name, value in loaded.items()}


def _refuse_compressed(path: Path) -> None:
    """Refuse a zip file whose members are packed, before they are unpacked to whatever size they claim.

    torch.save packs nothing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(member.compress_size != member.file_size for member in archive.infolist())
    except Exception:  # not a zip file, or a damaged one: that is said after torch.load has tried
        return
    if packed:
        raise CheckpointError(
            f"{shown_path(path)} is a packed zip file, and torch.save packs nothing: unpack the checkpoint out of it"
        )


def _why_not_loaded(path: Path) -> str:
    if name := foreign_call(path):
        return (
            f"asks for {name} to be called while loading: it was not loaded and nothing of it was executed; use a "
            "safetensors version of this checkpoint"
        )
    if _breaks_off(path):
        return "is not a whole file of torch.save: it is truncated or damaged, fetch it again"
    return (
        "cannot be read as a file of torch.save: nothing of it was executed; use a safetensors version of this "
        "checkpoint, or save its state_dict with torch.save"
    )


def _breaks_off(path: Path) -> bool:
    """Whether ``path``, which cannot be loaded, begins as torch.save begins and so must be damaged further on."""
    with path.open("rb") as file:
        head = file.read(max(map(len, _BEGINNINGS)))
    begins = any(head.startswith(beginning) or beginning.startswith(head) for beginning in _BEGINNINGS)
    try:
        return begins and not zipfile.is_zipfile(path)  # a zip file is known by its end: it is there
    except zipfile.BadZipFile:
        return begins
