"""Real process groups for tests: a few worker processes a session that run functions as ranks.

Starting a process that imports torch costs seconds, so the workers stay alive and take job after job. They meet
through a file (no port), and a job that fails or hangs takes its pool down with it, never the test session.
"""

from __future__ import annotations

import multiprocessing as mp
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tp_mamba.parallel.group import TensorParallel

Job = Callable[..., Any]


def _serve(rank: int, size: int, rendezvous: str, backend: str, pipe: Connection) -> None:
    """One rank: join the group, then run jobs until told to stop."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        tp = TensorParallel(dist.group.WORLD)
        while True:
            try:
                job = pipe.recv_bytes()
            except EOFError:
                return
            try:
                function, args, kwargs = pickle.loads(job)
                pipe.send_bytes(pickle.dumps((True, function(tp, *args, **kwargs))))
            except BaseException as error:
                # The other ranks may be waiting for this one in a collective: leave, so that they fail too.
                pipe.send_bytes(
                    pickle.dumps((False, (type(error).__name__, str(error), traceback.format_exc())))
                )
    finally:
        dist.destroy_process_group()


class JobError(Exception):
    """A job failed on at least one rank; ``failures`` maps rank to (exception name, message)."""

    def __init__(self, failures: dict[int, tuple[str, str]], details: str) -> None:
        super().__init__(details)
        self.failures = failures


class RankPool:
    """``size`` worker processes that form one gloo (or NCCL) group."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, rendezvous, self.backend, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Job, *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """``function(tp, *args, **kwargs)`` on every rank; their results in rank order.

        Raises:
            JobError: it raised on some rank.
            TimeoutError: it did not end in time; the pool is killed.
        """
        if not self._processes:
            self._start()
        job = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        failures: dict[int, tuple[str, str]] = {}
        details = ""
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.size} did not finish within {timeout} s")
            ok, value = pickle.loads(pipe.recv_bytes())
            results.append(value)
            if not ok:
                failures[rank] = value[:2]
                details += f"\n--- rank {rank}\n{value[2]}"
        if failures:
            if len(failures) < self.size:
                self.close()  # some ranks may have been left inside a collective
            raise JobError(failures, details)
        return results

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


class SingleRank:
    """One rank without a process group, behind the same interface; runs in the test's own process."""

    size = 1

    def run(self, function: Job, *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        return [function(TensorParallel(device="cpu"), *args, **kwargs)]

    def close(self) -> None:
        """Nothing was started."""
