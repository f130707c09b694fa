"""Kills a writer at each of its steps in turn, and looks at what is there afterwards.

A program of its own, without torch, so that it may fork for every step: ``writer_kills.py FOLDER exchange|renames``.
The writer replaces FOLDER/target, which holds "old", by a folder of two files that hold "new". Steps are what Python
audits (opening, renaming, making, removing) and the exchange itself; the kill comes before the step, and once after
the last. Prints one JSON object per kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from tp_mamba.checkpoint import atomic
from tp_mamba.checkpoint.leftovers import recover
from tp_mamba.checkpoint.replace import replacing

NAMES = ("config.json", "model.safetensors")
STEPS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "exchange")


def fill(folder: Path, text: str) -> None:
    for name in NAMES:
        (folder / name).write_text(text)


def content(folder: Path) -> str:
    """What every file of the folder holds, or what is wrong."""
    if not folder.is_dir():
        return "nothing"
    found = {path.name: path.read_text() for path in folder.iterdir()}
    return found[NAMES[0]] if set(found) == set(NAMES) and len(set(found.values())) == 1 else repr(found)


def write_and_die(target: Path, step: int, by_renames: bool) -> None:
    """Replace ``target`` and be killed before step number ``step``; never returns."""
    left = step

    def count(event: str, _: Any = None) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    exchange = atomic.exchange

    def counted_exchange(a: Path, b: Path) -> bool:
        count("exchange")
        return False if by_renames else exchange(a, b)

    atomic.exchange = counted_exchange
    sys.addaudithook(count)
    with replacing(target) as new:
        fill(new, "new")
    os._exit(0)


def main(folder: Path, way: str) -> None:
    target, finished, step = folder / "target", False, 0
    while not finished:
        if not target.exists():
            target.mkdir()
        fill(target, "old")
        child = os.fork()
        if child == 0:
            write_and_die(target, step, way == "renames")
        _, status = os.waitpid(child, 0)
        finished = os.WIFEXITED(status)
        report: dict[str, Any] = {"step": step, "status": status, "found": content(target)}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            recover(target)
        report |= {"recovered": content(target), "told": [str(warning.message) for warning in told]}
        report["names"] = sorted(path.name for path in folder.iterdir())
        print(json.dumps(report), flush=True)
        step += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
