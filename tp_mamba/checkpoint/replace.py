"""Putting a new checkpoint folder in place, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tp_mamba.checkpoint.atomic import put_in_place
from tp_mamba.checkpoint.errors import CheckpointError, CheckpointWriteError
from tp_mamba.checkpoint.files import is_checkpoint_file
from tp_mamba.checkpoint.leftovers import recover, workplace
from tp_mamba.quoting import shown, shown_path


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` to write into, which takes its place when the body ends well.

    If anything fails, what stood at ``folder`` stays and the new files are removed. After a kill or a power cut it
    stands there too, or the new one does: what killed writers left beside it is removed, or put back, first.

    Raises:
        CheckpointError: something stands at ``folder`` that is not a checkpoint.
        CheckpointWriteError: the disk is full, or the files cannot be written for another reason.
    """
    target = Path(folder).expanduser().resolve()
    with writing(target):
        recover(target)
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with workplace(target) as (new, old):
            new.mkdir()
            yield new
            put_in_place(new, target, old)


def refuse_taken(folder: str | Path, origin: str | Path, *, overwrite: bool) -> None:
    """Make sure that a checkpoint made from ``origin`` may be written to ``folder`` without losing another.

    Raises:
        CheckpointError: ``folder`` is or contains ``origin``, holds something other than a checkpoint, or holds a
            checkpoint and not ``overwrite``.
        CheckpointWriteError: ``folder`` cannot be looked into.
    """
    target, source = Path(folder).expanduser().resolve(), Path(origin).expanduser()
    with writing(target):
        recover(target)
        if not target.exists():
            return
        # A folder of links, such as those of the hub's cache, lies where they point.
        files = [item for item in source.iterdir() if item.is_file()] if source.is_dir() else []
        if any(path.resolve().is_relative_to(target) for path in (source, *files)):
            raise CheckpointError(
                f"{shown_path(target)} holds the checkpoint to be read, which is never written over: "
                "choose another folder to write"
            )
        _check_replaceable(target)
        if not overwrite and any(target.iterdir()):
            raise CheckpointError(
                f"{shown_path(target)} holds a checkpoint already: choose another folder, or pass --overwrite "
                "(overwrite=True)"
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
            f"cannot write {shown_path(folder)} ({shown(error.strerror or error)}): nothing was changed there; make "
            "room or choose another folder"
        ) from error


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{shown_path(target)} is a file: choose a folder to save to")
    for item in sorted(target.iterdir()):
        if not is_checkpoint_file(item.name) or (item.is_dir() and not item.is_symlink()):
            raise CheckpointError(
                f"{shown_path(target)} holds {shown(item.name)}, which is not part of a checkpoint and would be lost: "
                "choose another folder"
            )
