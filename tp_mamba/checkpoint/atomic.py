"""Putting a written file or folder in place in one step, and on the disk for good.

After a power cut, a rename may be on the disk and what was renamed may not: so the data is flushed before the rename
(fsync of every file and folder in it), and the folder that holds the name after it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tp_mamba.checkpoint.leftovers import recover, workplace

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_CANNOT: Final = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)
"""What renameat2 says where the kernel, the file system or a sandbox does not know how to exchange."""


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write one file to, which takes the place of ``path`` when the body ends well.

    ``path`` is at every moment the old file or the new one, whole, also after a kill or a power cut. What killed
    writers left beside it is removed.

    Raises:
        OSError: the file cannot be flushed or renamed.
    """
    target = Path(path).expanduser().resolve()
    recover(target)
    with workplace(target) as (new, _):
        yield new
        sync(new)
        os.replace(new, target)
        sync(target.parent)


def put_in_place(new: Path, target: Path, old: Path) -> None:
    """Make the folder ``new`` be at ``target``, and what stood there, if anything, at ``new`` or nowhere.

    In one step where the system can exchange two names (Linux, and most of its file systems). Elsewhere in two, with
    ``target`` moved to ``old`` between them, from where :func:`tp_mamba.checkpoint.leftovers.recover` takes it back.

    Raises:
        OSError: a folder cannot be renamed; ``target`` is what it was.
    """
    sync_tree(new)
    if not os.path.lexists(target):
        new.rename(target)
    elif not exchange(new, target):
        target.rename(old)
        new.rename(target)  # if this fails, workplace() moves the old folder back
        old.rename(new)  # it must not be put back from now on: a kill may leave half of it
    sync(target.parent)


def exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where the system cannot.

    Raises:
        OSError: it can, and these two it may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameat2", None)  # glibc from 2.28, musl from 1.2.6
    if rename is None:
        return False
    names = os.fsencode(a), os.fsencode(b)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def sync(path: Path) -> None:
    """Flush the file or folder ``path`` to the disk; a folder only where the file system can."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Flush every file in ``folder``, and ``folder``."""
    for path in sorted(folder.iterdir()):
        sync(path)
    sync(folder)
