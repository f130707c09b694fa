"""From what a user typed, a folder path or a model name, to a folder of files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from huggingface_hub import constants, model_info, snapshot_download

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import BIN_PATTERNS, COMPANIONS, CONFIG, SAFETENSORS_PATTERNS

HUB_TIMEOUT_S: Final = 10.0
"""How long the hub may take to answer before a name counts as unreachable."""

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve(path_or_name: str | os.PathLike[str], *, config_only: bool = False) -> Path:
    """The folder ``path_or_name`` stands for: itself, or the local copy of that name on the Hugging Face hub.

    A name is downloaded to the hub's own cache, safetensors where the repository has them and else ``.bin``
    files, with its tokenizer. ``HF_HUB_OFFLINE=1`` and an earlier download are respected.

    Args:
        config_only: fetch nothing of a name but its config.json.

    Raises:
        CheckpointError: there is no such folder, and no such name can be downloaded.
    """
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if folder.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds config.json and the weights")
    if not isinstance(path_or_name, str) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name} does not exist: give a checkpoint folder or the name of a model on the hub"
        )
    failure = _ask_hub(name)
    if config_only:
        return _download(name, (CONFIG,), failure)
    found = _download(name, (CONFIG, *COMPANIONS, *SAFETENSORS_PATTERNS), failure)
    if not any(found.glob("*.safetensors")):
        found = _download(name, BIN_PATTERNS, failure)
    return found


def _ask_hub(name: str) -> Exception | None:
    """Why the hub does not give ``name``, None if it does or is not to be asked.

    snapshot_download would wait for ever for a hub that takes the call and never answers.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        model_info(name, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # httpx, requests, hub and OS errors, depending on version and network
        return error
    return None


def _download(name: str, patterns: tuple[str, ...], failure: Exception | None) -> Path:
    """The snapshot of ``name`` with the files of ``patterns``; after a ``failure``, only what is there already."""
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(patterns), local_files_only=failure is not None)
        )
    except Exception as error:  # as above
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{name} is no folder here and not among the downloaded models, and HF_HUB_OFFLINE is set: "
                "give a folder, or download the model first"
            ) from error
        reason = str(failure or error).strip().partition("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{name} is no folder here and could not be downloaded from the Hugging Face hub ({reason}): "
            "check the name and the network, or give a folder"
        ) from error
