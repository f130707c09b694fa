"""Opening whatever holds the weights of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import BIN, MANIFEST, SAFETENSORS
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.checkpoint.sources.bin import BinSource
from tp_mamba.checkpoint.sources.safetensors import SafetensorsSource
from tp_mamba.checkpoint.sources.shards import ShardedSource

__all__ = ["TensorSource", "open_source"]


def open_source(folder: str | Path, *, rank: int = 0, size: int = 1) -> TensorSource:
    """The weights in ``folder``; headers are read, no weight is.

    Taken in this order: our per-rank files, ``model.safetensors.index.json``, ``model.safetensors``,
    ``pytorch_model.bin.index.json``, ``pytorch_model.bin``.

    Args:
        rank, size: who will read, so that of per-rank files only the needed ones are opened.

    Raises:
        CheckpointError: there are no weights, a file is missing or damaged, or an index is not to be trusted.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return ShardedSource(folder, rank=rank, size=size)
    kinds: tuple[tuple[str, type[SafetensorsSource] | type[BinSource]], ...] = (
        (SAFETENSORS, SafetensorsSource),
        (BIN, BinSource),
    )
    for name, kind in kinds:
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_index(index)
            return kind(sorted(set(weight_map.values())), weight_map)
        if (folder / name).is_file():
            return kind([folder / name])
    raise CheckpointError(
        f"{folder} holds no weights, neither {SAFETENSORS} nor {BIN} nor the index of several: give the folder of "
        "a whole checkpoint, or copy them there"
    )


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name to file, from a Hugging Face index; every file exists and lies in the index's folder.

    Raises:
        CheckpointError: the index is damaged, names a missing file, or points outside its folder.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names: fetch it again")
    if not weight_map:
        raise CheckpointError(f"{path} lists no tensors: fetch it again")
    files = {file: _checked_file(path, file) for file in sorted(set(weight_map.values()))}
    return {name: files[file] for name, file in weight_map.items()}


def _checked_file(index: Path, file: str) -> Path:
    folder = index.parent.resolve()
    path = index.parent / file
    target = path.resolve()
    # The hub's cache keeps snapshots/<revision>/<file> as links to blobs/<hash> of the same model.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    if not path.absolute().is_relative_to(index.parent.absolute()) or ".." in Path(file).parts:
        raise CheckpointError(
            f"{index} points at {file}, outside its folder: the checkpoint is not to be trusted"
        )
    if not target.is_relative_to(folder) and target.parent != blobs:
        raise CheckpointError(
            f"{index} points at {file}, a link to {target} outside its folder: copy the file into the folder"
        )
    if not target.is_file():
        raise CheckpointError(
            f"{index} names {file}, which is missing: fetch it, the checkpoint is not whole"
        )
    return path
