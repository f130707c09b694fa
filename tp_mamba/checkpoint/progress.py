"""How long work on files tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(what, bytes done, bytes in all)``."""


def counter(what: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    """A function that takes the bytes done since its last call and hands the sum to ``progress``, if any."""
    done = 0

    def add(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(what, done, total)

    return add
