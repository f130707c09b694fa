"""Checkpoints of a training run: written by a thread while training goes on, each whole or not there.

A run's folder holds ``step-00000100/`` and so on. One is written beside its name, as ``step-00000100.partial``, by
:mod:`torch.distributed.checkpoint`, and renamed by one rank when every rank's part is on the disk. Removing one begins
with the opposite renaming. So whatever bears the name of a checkpoint is whole, whenever a process was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tp_mamba.checkpoint.atomic import sync, sync_tree
from tp_mamba.checkpoint.errors import CheckpointError, CheckpointWriteError
from tp_mamba.checkpoint.json_file import read_json_object
from tp_mamba.checkpoint.leftovers import remove
from tp_mamba.quoting import shown, shown_path
from tp_mamba.training.ranks import Ranks

RUN: Final = "run.json"
"""What a checkpoint holds beside its tensors: the step, the position in the data, the model, the settings."""

_NAME: Final = re.compile(r"step-(\d{8,})")
_PARTIAL: Final = ".partial"
_LOCK: Final = ".lock"


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is."""
    return run / f"step-{step:08d}"


def steps_in(run: Path) -> list[int]:
    """The steps that ``run`` holds checkpoints of, in order."""
    if not run.is_dir():
        return []
    return sorted(int(match[1]) for path in run.iterdir() if (match := _NAME.fullmatch(path.name)))


def read_run(folder: Path) -> dict[str, Any]:
    """What :data:`RUN` of a checkpoint says.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    try:
        return read_json_object(folder / RUN, remedy="take another checkpoint", error=CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{shown_path(folder)} holds no {RUN}: name a checkpoint that tp-mamba train has written"
        ) from error


def hold_run(run: Path) -> int:
    """Make the folder of a run this process's alone, until the file that is returned is closed; clear up in it.

    What killed writers left is removed. Rank 0 calls this.

    Raises:
        ValueError: another process trains into it.
        CheckpointWriteError: it cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = os.open(run / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot write {shown_path(run)} ({shown(error.strerror or error)}): name another folder with --out"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"another process trains into {shown_path(run)}: let it end first, or name another folder with --out"
        ) from None
    for path in run.iterdir():
        if path.name.endswith(_PARTIAL):
            remove(path)
    return lock


class Saver:
    """Writes the checkpoints of one run; every rank has one and calls the same methods in the same order."""

    def __init__(self, run: Path, ranks: Ranks, keep: int) -> None:
        """Keep the last ``keep`` checkpoints, and any that is named to :meth:`save` as to be kept."""
        self._run, self._ranks, self._keep = run, ranks, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writes checkpoints")
        self._running: Future[None] | None = None

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], info: Mapping[str, Any], spared: int | None
    ) -> None:
        """Write ``tensors`` and ``info`` as the checkpoint of ``step``, while the caller goes on.

        Waits for the one before.

        Args:
            tensors: on the CPU and nobody else's; as :meth:`tp_mamba.training.layout.Layout.describe` gives them.
            info: for :data:`RUN`.
            spared: the step of a checkpoint that is not removed, however old.

        Raises:
            CheckpointWriteError: the one before could not be written.
        """
        self.wait()
        self._running = self._pool.submit(self._write, step, tensors, dict(info), spared)

    def wait(self) -> None:
        """Until what is being written is there.

        Raises:
            CheckpointWriteError: on every rank, it could not be written on one of them; the one before is there.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """End the thread, after what it writes; a failure of that is a warning."""
        try:
            self.wait()
        except CheckpointWriteError as error:
            warnings.warn(str(error), SaveWarning, stacklevel=2)
        self._pool.shutdown()

    def _write(
        self, step: int, tensors: dict[str, torch.Tensor], info: dict[str, Any], spared: int | None
    ) -> None:
        target = step_folder(self._run, step)
        new = target.with_name(target.name + _PARTIAL)
        owner = self._ranks.is_owner
        try:
            if owner and target.exists():  # a run that is resumed from before it has come here again
                self._discard(target)
            write_tensors(new, tensors, self._ranks)
            if owner:
                (new / RUN).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
                sync_tree(new)
                new.rename(target)
                sync(target.parent)
                self._prune(spared)
        except OSError as error:
            if owner:
                remove(new)
            raise CheckpointWriteError(self._sentence(step, shown(error.strerror or error))) from error
        except (
            Exception,
            CheckpointException,
        ) as error:  # what failed on any rank; the latter is no Exception
            if owner:
                remove(new)
            raise CheckpointWriteError(self._sentence(step, _cause(error))) from error

    def _sentence(self, step: int, why: str) -> str:
        left = [at for at in steps_in(self._run) if at != step]
        last = (
            f"the last good one is {step_folder(self._run, left[-1]).name}"
            if left
            else "there is none before it"
        )
        return (
            f"the checkpoint of step {step} cannot be written to {shown_path(self._run)} ({why}), {last}: make room "
            "there, then go on with --resume"
        )

    def _prune(self, spared: int | None) -> None:
        for step in steps_in(self._run)[: -self._keep]:
            if step != spared:
                self._discard(step_folder(self._run, step))

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint; at no moment does half of one bear its name."""
        doomed = folder.with_name(f"{folder.name}.old{_PARTIAL}")
        remove(doomed)
        with suppress(OSError):
            folder.rename(doomed)
            remove(doomed)


class SaveWarning(UserWarning):
    """The last checkpoint could not be written, while training ended for another reason."""


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Write ``tensors`` to ``folder`` from all ranks, through :mod:`torch.distributed.checkpoint`."""
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    with _quiet():
        dcp.save(
            tensors, storage_writer=writer, process_group=ranks.file_group, no_dist=ranks.file_group is None
        )


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Fill ``tensors``, which are described as for writing, from ``folder``, at whatever ranks it was written.

    Raises:
        CheckpointError: it is damaged, or lacks one of them.
    """
    reader = dcp.FileSystemReader(folder)
    try:
        with _quiet():
            dcp.load(
                tensors,
                storage_reader=reader,
                process_group=ranks.file_group,
                no_dist=ranks.file_group is None,
            )
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{shown_path(folder)} cannot be read as a checkpoint of this run ({_cause(error)}): resume from another"
        ) from error


def _cause(error: BaseException) -> str:
    """The first failure of those that a rank reported, on one line."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, (cause, _) = min(failures.items())
        return f"{shown(getattr(cause, 'strerror', None) or cause)} on rank {rank}"
    return shown(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch does not tell a process on its own that it is on its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
        yield
