"""Putting a new checkpoint folder in place, whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tp_mamba.checkpoint.errors import CheckpointError, CheckpointWriteError
from tp_mamba.checkpoint.files import is_checkpoint_file


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` to write into, which takes its place when the body ends well.

    If anything fails, what stood at ``folder`` stays and the new files are removed.

    Raises:
        CheckpointError: something stands at ``folder`` that is not a checkpoint.
        CheckpointWriteError: the disk is full, or the files cannot be written for another reason.
    """
    target = Path(folder).expanduser().resolve()
    with writing(target):
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(target, "new")
        try:
            temporary.mkdir()
            yield temporary
            _swap(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_taken(folder: str | Path, origin: str | Path, *, overwrite: bool) -> None:
    """Make sure that a checkpoint made from ``origin`` may be written to ``folder`` without losing another.

    Raises:
        CheckpointError: ``folder`` is or contains ``origin``, holds something other than a checkpoint, or holds a
            checkpoint and not ``overwrite``.
        CheckpointWriteError: ``folder`` cannot be looked into.
    """
    target, source = Path(folder).expanduser().resolve(), Path(origin).expanduser()
    with writing(target):
        if not target.exists():
            return
        # A folder of links, such as those of the hub's cache, lies where they point.
        files = [item for item in source.iterdir() if item.is_file()] if source.is_dir() else []
        if any(path.resolve().is_relative_to(target) for path in (source, *files)):
            raise CheckpointError(
                f"{target} holds the checkpoint to be read, which is never written over: choose another folder to write"
            )
        _check_replaceable(target)
        if not overwrite and any(target.iterdir()):
            raise CheckpointError(
                f"{target} holds a checkpoint already: choose another folder, or pass --overwrite (overwrite=True)"
            )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the body's OSError into one sentence about ``folder``.

    Raises:
        CheckpointWriteError: in place of any other OSError.
    """
    try:
        yield
    except CheckpointWriteError:
        raise
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot write {folder} ({error.strerror or error}): nothing was changed there; make room or choose "
            "another folder"
        ) from error


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: choose a folder to save to")
    for item in sorted(target.iterdir()):
        if not is_checkpoint_file(item.name) or (item.is_dir() and not item.is_symlink()):
            raise CheckpointError(
                f"{target} holds {item.name}, which is not part of a checkpoint and would be lost: "
                "choose another folder"
            )


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{what}")
