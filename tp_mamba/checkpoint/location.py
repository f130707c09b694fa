"""From what a user typed, a folder path or a model name, to a folder of files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from huggingface_hub import constants, model_info, snapshot_download

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import BIN_PATTERNS, COMPANIONS, CONFIG, SAFETENSORS_PATTERNS

_HUB_TIMEOUT_S: Final = 10.0
"""How long the hub may take to answer before a name counts as unreachable."""

_REMEDY: Final = "give a checkpoint folder or the name of a model on the hub"
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
    name = _checked_name(path_or_name, _REMEDY)
    failure = _ask_hub(name)
    if config_only:
        return _download(name, (CONFIG,), failure, _REMEDY)
    found = _download(name, (CONFIG, *COMPANIONS, *SAFETENSORS_PATTERNS), failure, _REMEDY)
    if not any(found.glob("*.safetensors")):
        found = _download(name, BIN_PATTERNS, failure, _REMEDY)
    return found


def fetch(path_or_name: str | os.PathLike[str], patterns: tuple[str, ...], *, remedy: str) -> Path:
    """As :func:`resolve`, for other files: a folder as it is, of a name on the hub the files that match.

    Args:
        patterns: names of files, perhaps with ``*``. That the hub's repository has any of them is not checked.
        remedy: what to do instead, for the end of an error's sentence.

    Raises:
        CheckpointError: there is no such folder, and nothing of that name can be downloaded.
    """
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    name = _checked_name(path_or_name, remedy)
    return _download(name, patterns, _ask_hub(name), remedy)


def _checked_name(path_or_name: str | os.PathLike[str], remedy: str) -> str:
    """``path_or_name``, which is no folder, as a name that the hub can be asked for."""
    name = str(path_or_name)
    if Path(path_or_name).expanduser().exists():
        raise CheckpointError(f"{name} is a file, and the folder that holds it is wanted: {remedy}")
    if not isinstance(path_or_name, str) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{name} does not exist: {remedy}")
    return name


def _ask_hub(name: str) -> Exception | None:
    """Why the hub does not give ``name``, None if it does or is not to be asked.

    snapshot_download would wait for ever for a hub that takes the call and never answers.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        model_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # httpx, requests, hub and OS errors, depending on version and network
        return error
    return None


def _download(name: str, patterns: tuple[str, ...], failure: Exception | None, remedy: str) -> Path:
    """The snapshot of ``name`` with the files of ``patterns``; after a ``failure``, only what is there already."""
    try:
        found = Path(
            snapshot_download(name, allow_patterns=list(patterns), local_files_only=failure is not None)
        )
    except Exception as error:  # as above
        raise _unavailable(name, failure or error, remedy) from error
    asked = failure is None and not constants.HF_HUB_OFFLINE
    if not asked and not any(any(found.glob(pattern)) for pattern in patterns):
        raise _unavailable(name, failure, remedy)  # an earlier download was of other files
    return found


def _unavailable(name: str, failure: Exception | None, remedy: str) -> CheckpointError:
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{name} is no folder here and not among the downloaded models, and HF_HUB_OFFLINE is set: "
            f"unset it, or {remedy}"
        )
    reason = str(failure).strip().partition("\n")[0].rstrip(".")
    return CheckpointError(
        f"{name} is no folder here and could not be downloaded from the Hugging Face hub ({reason}): "
        f"check the name and the network, or {remedy}"
    )
