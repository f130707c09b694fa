"""What a killed writer leaves beside its target, and whether a writer still lives.

A writer of ``name`` works in ``.name.<stamp>.new`` beside it, and holds a lock (flock) on ``.name.<stamp>.lock`` for
as long as it lives: the system takes the lock away from a killed process, whatever killed it. Where two renames put
a folder in place, what stood there is ``.name.<stamp>.old`` between the two.

So of the leftovers whose lock can be taken, or that have none, ``.new`` is rubbish, and ``.old`` is the only copy of
the target if the target is not there.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tp_mamba.quoting import shown, shown_path

_NEW: Final = "new"
_OLD: Final = "old"
_LOCK: Final = "lock"


class LeftoverWarning(UserWarning):
    """A killed writer's leftovers were found or removed, or what it had taken away was put back."""


@contextmanager
def workplace(target: Path) -> Iterator[tuple[Path, Path]]:
    """Names of hidden siblings of ``target`` to write to and to move ``target`` to, safe from :func:`recover`.

    Neither exists at first. At the end the second is moved back if ``target`` is gone, and both are removed: what is
    to stay has been renamed before.
    """
    stamp, lock = _claim(target)
    new, old = _sibling(target, stamp, _NEW), _sibling(target, stamp, _OLD)
    try:
        yield new, old
    finally:
        _put_back(old, target)
        remove(new)
        if os.path.lexists(target):  # else it could not be moved back, and is the only copy
            remove(old)
        with suppress(OSError):
            _sibling(target, stamp, _LOCK).unlink()
        os.close(lock)


def recover(target: Path) -> None:
    """Remove what killed writers of ``target`` left beside it, and put back a ``target`` that one had moved away.

    Leftovers of a living writer, or on a file system without locks, are not touched. What was done is said in a
    :class:`LeftoverWarning`; what cannot be done is left as it is.
    """
    found = _leftovers(target)
    for stamp, kinds in found.items():
        with _taken(_sibling(target, stamp, _LOCK)) as dead:
            if not dead:
                continue
            old = _sibling(target, stamp, _OLD)
            if _OLD in kinds and _put_back(old, target):
                _say(f"put back {shown_path(target)}, which a killed writer had moved to {shown(old.name)}")
            if not os.path.lexists(target) and os.path.lexists(old):
                continue  # the only copy there is, and it could not be moved
            for path in (_sibling(target, stamp, _NEW), old):
                if os.path.lexists(path):
                    remove(path)
                    if not os.path.lexists(path):
                        _say(f"removed {shown_path(path)}, which a killed writer had left")


def name_leftovers(target: Path) -> None:
    """Name what killed writers of ``target`` left beside it, each in a :class:`LeftoverWarning`; touch nothing."""
    for stamp, kinds in _leftovers(target).items():
        if kinds == {_LOCK}:  # empty, or of a writer that begins just now
            continue
        with _taken(_sibling(target, stamp, _LOCK), keep=True) as dead:
            for kind in sorted(kinds - {_LOCK}) if dead else ():
                _say(
                    f"{shown_path(_sibling(target, stamp, kind))} was left by a killed writer of "
                    f"{shown(target.name)}: the next one removes it, or remove it"
                )


def _put_back(old: Path, target: Path) -> bool:
    """Rename ``old`` to ``target`` if that is missing; whether it was done."""
    if os.path.lexists(target) or not os.path.lexists(old):
        return False
    with suppress(OSError):
        old.rename(target)
        return True
    return False


def remove(path: Path) -> None:
    """Remove the file or folder ``path`` if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _say(sentence: str) -> None:
    warnings.warn(sentence, LeftoverWarning, stacklevel=3)


def _sibling(target: Path, stamp: str, kind: str) -> Path:
    return target.with_name(f".{target.name}.{stamp}.{kind}")


def _leftovers(target: Path) -> dict[str, set[str]]:
    """Stamp to the kinds of siblings that bear it."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})\.({_NEW}|{_OLD}|{_LOCK})")
    found: dict[str, set[str]] = {}
    try:
        names = os.listdir(target.parent)
    except OSError:
        return {}
    for name in names:
        if match := pattern.fullmatch(name):
            found.setdefault(match[1], set()).add(match[2])
    return found


def _claim(target: Path) -> tuple[str, int]:
    """A new stamp and the open file that holds its lock."""
    while True:
        stamp = uuid.uuid4().hex[:8]
        path = _sibling(target, stamp, _LOCK)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        if _lock(lock) is not False and _is_at(
            lock, path
        ):  # else recover() came between creating and locking
            return stamp, lock
        os.close(lock)


@contextmanager
def _taken(path: Path, *, keep: bool = False) -> Iterator[bool]:
    """Whether the writer with the lock file ``path`` is dead; its lock is held meanwhile.

    At the end the file of a dead writer is removed, unless it is to be kept.
    """
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # a writer makes it first and removes it last
        yield True
        return
    except OSError:
        yield False
        return
    try:
        dead = _lock(lock) is True and _is_at(lock, path)
        yield dead
        if dead and not keep:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _lock(file: int) -> bool | None:
    """Take the lock of an open file: whether that worked, None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
