"""Trains, is killed at one step of its work on files after another, and goes on from what is there.

A program of its own, so that it may fork: ``training_kills.py FOLDER KILLS``. Steps are what Python audits (opening,
renaming, making and removing files) below the folder; the kill comes before the step. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import torch
from training_samples import CONFIG, curve, trainer

from tp_mamba.parallel.group import TensorParallel
from tp_mamba.training.export import export_run
from tp_mamba.training.saver import hold_run, steps_in

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def train(run: Path, kill_at: int | None) -> tuple[list[float], int]:
    """The losses of what was left to train, and how many steps on files it took; or be killed at one of them."""
    count, root = 0, str(run)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in EVENTS and str(args[0]).startswith(root):
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(audit)
    hold_run(run)
    of = trainer(TensorParallel(device="cpu"), run, save_every=1, keep=2)
    if steps := steps_in(run):
        of.load(steps[-1])
    return curve(of), count


def in_child(run: Path, kill_at: int | None) -> dict[str, Any] | None:
    """What :func:`train` gives in a process of its own; None if that was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        losses, count = train(run, kill_at)
        os.write(writer, json.dumps({"losses": losses, "count": count}).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    answer = os.read(reader, 1 << 16)
    os.close(reader)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, status
    return json.loads(answer)


def readable(folder: Path, run: Path) -> list[int]:
    """The steps of the checkpoints in ``run``, each of which was read whole."""
    steps = steps_in(run)
    for step in steps:
        export_run(run, folder / "export", step=step, dtype=torch.float32)
    return steps


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    assert CONFIG.vocab_size
    whole = in_child(folder / "whole", None)
    assert whole is not None
    found = []
    for i in range(kills):
        # Each run is killed once, then goes on to the end.
        run = folder / f"run{i}"
        at = whole["count"] * (2 * i + 1) // (2 * kills)
        assert in_child(run, at) is None
        steps = readable(folder, run)
        after = in_child(run, None)
        assert after is not None
        found.append(
            {
                "at": at,
                "steps": steps,
                "losses": after["losses"],
                "left": sorted(p.name for p in run.iterdir()),
            }
        )
    print(json.dumps({"losses": whole["losses"], "count": whole["count"], "killed": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
