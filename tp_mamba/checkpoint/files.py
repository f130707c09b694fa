"""The files a checkpoint folder is made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from tp_mamba.checkpoint.errors import CheckpointError

CONFIG: Final = "config.json"
SAFETENSORS: Final = "model.safetensors"
BIN: Final = "pytorch_model.bin"
MANIFEST: Final = "tp_mamba_shards.json"
"""Marks a folder of per-rank files, and says how they were cut."""

SAFETENSORS_PATTERNS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    MANIFEST,
)
BIN_PATTERNS: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")
COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Copied unchanged from a checkpoint to one made from it: the tokenizer and how to sample."""

_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint, so that a newer checkpoint may replace it."""
    return any(
        fnmatch(name, pattern) for pattern in (CONFIG, *SAFETENSORS_PATTERNS, *BIN_PATTERNS, *COMPANIONS)
    )


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the few lines that git leaves in place of a file that git-lfs has not fetched.

    Raises:
        CheckpointError: ``path`` is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the file: run git lfs pull in its folder"
            )


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files that ``source`` has into ``target``."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` the way config.json files are published: indented, newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
