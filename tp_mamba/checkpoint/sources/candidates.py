"""Which files of a folder hold the weights, where more than one set of files might."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import BIN, GGUF_PATTERN, GGUF_REFUSED, MANIFEST, SAFETENSORS
from tp_mamba.checkpoint.json_file import read_json_object
from tp_mamba.quoting import shown, shown_path

_SHARD_FILE = re.compile(r"model-tp-\d{5,}-of-\d{5,}\.safetensors")


class Layout(Enum):
    """How weights are laid out in files; the value is what a person is told."""

    SHARDS = "one file per rank, by tp-mamba shard"
    SAFETENSORS = "safetensors"
    BIN = "pickled .bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A set of files that holds weights."""

    layout: Layout
    files: tuple[Path, ...]
    """The files of weights; of :attr:`Layout.SHARDS` those that are there."""
    weight_map: dict[str, Path] | None = None
    """Tensor name to file, from an index; None without one."""
    name: str
    """What to call it in a message, and what to remove to be rid of it."""


def find_weights(folder: Path) -> Candidate:
    """The one set of files in ``folder`` that holds its weights.

    Safetensors files go before ``.bin`` files, as in transformers: a checkpoint is published in both. Otherwise a
    folder must hold one checkpoint. What is left of an older one does not count: an index beside a single file, when
    files that the index names are missing; our manifest, when none of its files is there.

    Raises:
        CheckpointError: there are no weights; there are two sets of them and either might be meant; or an index is
            damaged, names a missing file, or points outside its folder.
    """
    shards, safetensors = _shards(folder), _one_format(folder, SAFETENSORS, Layout.SAFETENSORS)
    published = safetensors or _one_format(folder, BIN, Layout.BIN)
    if shards is not None and published is not None:
        if shards.files:
            raise _two(folder, shards, published)
        return published
    found = shards or published
    if found is None:
        raise CheckpointError(f"{shown_path(folder)} {_why_none(os.listdir(folder))}")
    return found


def _shards(folder: Path) -> Candidate | None:
    if not (folder / MANIFEST).is_file():
        return None
    files = tuple(folder / name for name in sorted(os.listdir(folder)) if _SHARD_FILE.fullmatch(name))
    return Candidate(
        layout=Layout.SHARDS, files=files, name=f"{MANIFEST} with its model-tp-*-of-*.safetensors"
    )


def _one_format(folder: Path, name: str, layout: Layout) -> Candidate | None:
    single, index = folder / name, folder / f"{name}.index.json"
    one = Candidate(layout=layout, files=(single,), name=name) if single.is_file() else None
    if not index.is_file():
        return one
    named = _files_of(index)
    paths: dict[str, Path] = {}
    missing = None
    for file in sorted(set(named.values())):
        paths[file] = _inside(index, file)
        if not _is_file(paths[file]):
            missing = file  # enough is known, however many more the index names
            break
    of_its_own = name not in named.values()
    if missing is not None:
        if one is not None and of_its_own:
            return one
        raise CheckpointError(
            f"{shown_path(index)} names {shown(missing)}, which is missing: fetch it, the checkpoint is not whole"
        )
    files = "file" if len(paths) == 1 else f"{len(paths)} files"
    several = Candidate(
        layout=layout,
        files=tuple(paths.values()),
        weight_map={tensor: paths[file] for tensor, file in named.items()},
        name=f"{index.name} with its {files} ({shown(next(iter(paths)))}{', ...' if len(paths) > 1 else ''})",
    )
    if one is not None and of_its_own:
        raise _two(folder, several, one)
    return several


def _two(folder: Path, a: Candidate, b: Candidate) -> CheckpointError:
    return CheckpointError(
        f"{shown_path(folder)} holds weights twice, {a.name} and {b.name}, and nothing tells which are meant: "
        "remove the ones or the others"
    )


def _files_of(index: Path) -> dict[str, str]:
    """Tensor name to file name, as a Hugging Face index says."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{shown_path(index)} has no weight_map from tensor names to file names: fetch it again"
        )
    if not weight_map:
        raise CheckpointError(f"{shown_path(index)} lists no tensors: fetch it again")
    return weight_map


def _inside(index: Path, file: str) -> Path:
    """The path of ``file``, which lies in the index's folder if it is there at all."""
    where = f"{shown_path(index)} points at {shown(file)},"
    folder, path = index.parent.resolve(), index.parent / file
    # One spelling per file, so that an index is no longer than the folder that it stands in.
    if (
        "\0" in file
        or file in ("", ".")
        or os.path.normpath(file) != file
        or os.path.isabs(file)
        or ".." in path.parts
    ):
        raise CheckpointError(f"{where} outside its folder: the checkpoint is not to be trusted")
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name without an encoding
        raise CheckpointError(f"{where} which cannot be opened ({shown(error)}): fetch it again") from error
    # The hub's cache keeps snapshots/<revision>/<file> as links to blobs/<hash> of the same model.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    if not target.is_relative_to(folder) and target.parent != blobs:
        raise CheckpointError(
            f"{where} a link to {shown_path(target)} outside its folder: copy the file into the folder"
        )
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _why_none(names: Sequence[str]) -> str:
    """What is there instead of weights, and what to do about it."""

    def among(*patterns: str) -> str | None:
        return next(
            (shown(n) for n in sorted(names) if any(fnmatch(n, pattern) for pattern in patterns)), None
        )

    if file := among(GGUF_PATTERN):
        return f"holds {file}, {GGUF_REFUSED}"
    if file := among("*.safetensors", "*.bin", "*.pt", "*.pth"):
        return (
            f"holds {file}, but neither {SAFETENSORS} nor {BIN} nor an index that names it: copy the whole "
            "checkpoint there, index included"
        )
    return (
        f"holds no weights, neither {SAFETENSORS} nor {BIN} nor the index of several: give the folder of a whole "
        "checkpoint, or copy them there"
    )
