"""From what a user typed, a folder path or a model name, to a folder of files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import (
    ADAPTER_CONFIG,
    BIN_PATTERNS,
    COMPANIONS,
    CONFIG,
    SAFETENSORS_PATTERNS,
    refuse_adapter,
)
from tp_mamba.checkpoint.leftovers import name_leftovers, recover
from tp_mamba.quoting import NAME_LIMIT, shown, shown_path

_HUB_TIMEOUT_S: Final = 10.0
"""How long the hub may take to answer before a name counts as unreachable."""

_REMEDY: Final = "give a checkpoint folder or the name of a model on the hub"
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_MAX_HUB_NAME: Final = 200


def resolve(path_or_name: str | os.PathLike[str], *, config_only: bool = False) -> Path:
    """The folder ``path_or_name`` stands for: itself, or the local copy of that name on the Hugging Face hub.

    A name is downloaded to the hub's own cache, safetensors where the repository has them and else ``.bin``
    files, with its tokenizer. ``HF_HUB_OFFLINE=1`` and an earlier download are respected. What killed writers left
    beside a folder is named in a :class:`~tp_mamba.checkpoint.leftovers.LeftoverWarning`.

    Args:
        config_only: fetch nothing of a name but its config.json.

    Raises:
        CheckpointError: there is no such folder, and no such name can be downloaded; or it holds an adapter.
    """
    folder = _folder(path_or_name)
    if folder is None:
        copy = _HubCopy(_checked_name(path_or_name, _REMEDY), _REMEDY)
        if config_only:
            folder = copy.get((CONFIG, ADAPTER_CONFIG))
        else:
            folder = copy.get((CONFIG, ADAPTER_CONFIG), (*COMPANIONS, *SAFETENSORS_PATTERNS))
            if not any(folder.glob("*.safetensors")):
                folder = copy.get((*SAFETENSORS_PATTERNS, *BIN_PATTERNS))
    elif not config_only:
        name_leftovers(folder.absolute())
    refuse_adapter(folder)
    return folder


def fetch(
    path_or_name: str | os.PathLike[str],
    patterns: tuple[str, ...],
    *,
    optional: tuple[str, ...] = (),
    remedy: str,
) -> Path:
    """As :func:`resolve`, for other files: a folder as it is, of a name on the hub the files that match.

    Args:
        patterns: names of files, perhaps with ``*``. That the hub's repository has any of them is not checked.
        optional: further ones, without which an earlier download serves as well.
        remedy: what to do instead, for the end of an error's sentence.

    Raises:
        CheckpointError: there is no such folder, and nothing of that name can be downloaded.
    """
    folder = _folder(path_or_name)
    return folder or _HubCopy(_checked_name(path_or_name, remedy), remedy).get(patterns, optional)


def _folder(path_or_name: str | os.PathLike[str]) -> Path | None:
    """The folder of that path, if there is one, or was until a killed writer moved it away."""
    try:
        folder = Path(path_or_name).expanduser()
        if not folder.is_dir():
            recover(folder.absolute())
        return folder if folder.is_dir() else None
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a name too long, with a NUL in it, or of an unknown user's home
        return None


def _checked_name(path_or_name: str | os.PathLike[str], remedy: str) -> str:
    """``path_or_name``, which is no folder, as a name that the hub can be asked for."""
    name = str(path_or_name)
    if os.path.exists(os.path.expanduser(name)):  # unlike Path.exists, False for names that no file can have
        raise CheckpointError(
            f"{shown_path(name)} is a file, and the folder that holds it is wanted: {remedy}"
        )
    if not isinstance(path_or_name, str) or len(name) > _MAX_HUB_NAME or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{shown_path(name)} does not exist: {remedy}")
    return name


class _HubCopy:
    """The local copy of a model on the hub, filled up as far as the hub answers."""

    def __init__(self, name: str, remedy: str) -> None:
        self.name, self.remedy = name, remedy
        self.failure = _ask_hub(name)
        """Why the hub does not give the model; None where it does, or is not to be asked."""

    def get(self, needed: Sequence[str], optional: Sequence[str] = ()) -> Path:
        """The folder of the copy, with those files of both lists that the hub's repository has.

        Where the hub cannot be asked, an earlier download serves that has any of ``needed``.

        Args:
            needed, optional: names of files, perhaps with ``*``.

        Raises:
            CheckpointError: nothing can be downloaded, and there is no such earlier download.
        """
        asked = self.failure is None and not constants.HF_HUB_OFFLINE
        try:
            found = Path(
                snapshot_download(
                    self.name,
                    allow_patterns=[*needed, *optional],
                    local_files_only=self.failure is not None,
                )
            )
        except Exception as error:  # httpx, requests, hub and OS errors, depending on version and network
            # The hub's own check of an earlier download wants every file, also those that nothing here needs.
            path = None if asked else getattr(error, "snapshot_path", None)
            if path is None:
                raise self._unavailable(self.failure or error) from error
            found = Path(path)
        if not asked and not any(any(found.glob(pattern)) for pattern in needed):
            raise self._unavailable(self.failure, without=needed)
        return found

    def _unavailable(self, failure: Exception | None, without: Sequence[str] = ()) -> CheckpointError:
        if without:
            what = f"was downloaded without {' or '.join(without)}"
        elif constants.HF_HUB_OFFLINE and isinstance(failure, LocalEntryNotFoundError | None):
            what = "is no folder here and not among the downloaded models"
        elif constants.HF_HUB_OFFLINE:
            what = f"is no folder here and its download cannot be read ({_reason(failure)})"
        else:
            what = "is no folder here"
        if constants.HF_HUB_OFFLINE:
            return CheckpointError(
                f"{self.name} {what}, and HF_HUB_OFFLINE is set: unset it, or {self.remedy}"
            )
        return CheckpointError(
            f"{self.name} {what} and could not be downloaded from the Hugging Face hub ({_reason(failure)}): check the "
            f"name and the network, or {self.remedy}"
        )


def _reason(failure: Exception | None) -> str:
    return shown(str(failure).strip().partition("\n")[0].rstrip("."), 2 * NAME_LIMIT)


def _ask_hub(name: str) -> Exception | None:
    """Why the hub does not give ``name``; None if it does, or is not to be asked.

    snapshot_download would wait for ever for a hub that takes the call and never answers.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        model_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # as in _HubCopy
        return error
    return None
