"""The files a checkpoint folder is made of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.quoting import shown, shown_path

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

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_PATTERNS: Final = (
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
    "adapter_model-*.safetensors",
    "adapter_model*.bin",
)
"""Files of an adapter as PEFT writes them. They change what a model computes, and transformers reads them."""

GGUF_PATTERN: Final = "*.gguf"
GGUF_REFUSED: Final = (
    "weights quantised for llama.cpp, which are not read here: give the checkpoint that they were made from, in "
    "safetensors"
)

_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint, so that a newer checkpoint may replace it."""
    return any(
        fnmatch(name, pattern) for pattern in (CONFIG, *SAFETENSORS_PATTERNS, *BIN_PATTERNS, *COMPANIONS)
    )


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the few lines that git leaves in place of a file that git-lfs has not fetched.

    Raises:
        CheckpointError: ``path`` is such a pointer, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(
            f"{shown_path(path)} cannot be read ({error.strerror or shown(error)}): see to its permissions and its disk"
        ) from error
    if head == _LFS_POINTER:
        raise CheckpointError(
            f"{shown_path(path)} is a git-lfs pointer, not the file: run git lfs pull in its folder"
        )


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, which no loader here reads and which would make another model of this one.

    Raises:
        CheckpointError: ``folder`` holds one, with a model or alone, or cannot be looked into.
    """
    where = shown_path(folder)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{where} cannot be read ({error.strerror}): give a checkpoint folder"
        ) from error
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in ADAPTER_PATTERNS)]
    if not found:
        return
    if not any(is_checkpoint_file(name) and name not in COMPANIONS for name in names):
        raise CheckpointError(
            f"{where} holds an adapter alone ({shown(', '.join(found))}), not the model that it belongs to: merge it "
            "into its base model, save that, and give the folder of the result"
        )
    raise CheckpointError(
        f"{where} holds an adapter beside the model ({shown(', '.join(found))}), which would not be read: merge it "
        "into the weights and save those, or move its files away to load the model without it"
    )


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files that ``source`` has into ``target``."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` the way config.json files are published: indented, newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
