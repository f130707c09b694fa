"""Whether anything of a command is left after its end."""

from __future__ import annotations

import os
import time


def wait_until_empty(group: int, seconds: float = 120) -> None:
    """Wait for the end of every process of ``group``: multiprocessing's own helper leaves after its parent."""
    deadline = time.monotonic() + seconds
    while _exists(group):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
