"""Real process groups for tests: a few worker processes per session that run functions as ranks.

The workers stay alive and take job after job. They meet through a file (no port), and a job that fails or hangs takes
its pool down with it, never the test session.
"""

from __future__ import annotations

import multiprocessing as mp
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import forks
import torch

from tp_mamba.launch.ranks.failures import is_consequence
from tp_mamba.parallel.group import TensorParallel

Job = Callable[..., Any]

GRACE_S = 2.0
"""How long the other ranks have to end as well, or to tell the cause, once one has failed."""


def _serve(rank: int, size: int, rendezvous: str, backend: str, pipe: Connection) -> None:
    """One rank: join the group, then run jobs until told to stop."""
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the session, which ends its pools
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
                answer = pickle.dumps((function(tp, *args, **kwargs), None))
            except BaseException as error:
                name, text, trace = type(error).__name__, str(error), traceback.format_exc()
                answer = pickle.dumps((None, Failure(name, text, trace, is_consequence(error))))
            pipe.send_bytes(answer)
    finally:
        dist.destroy_process_group()


class Failure(NamedTuple):
    """Why a job failed on one rank."""

    error: str
    """Name of the exception's type; ``"exit"`` for a process that ended."""
    message: str
    trace: str
    consequence: bool
    """The rank only learned, by word or by a broken connection, that another one had failed."""


class JobError(Exception):
    """A job failed on at least one rank; ``failures`` maps rank to failure, causes before consequences."""

    def __init__(self, failures: dict[int, Failure]) -> None:
        self.failures = dict(sorted(failures.items(), key=lambda item: item[1].consequence))
        super().__init__(
            "".join(f"\n--- rank {rank}\n{failure.trace}" for rank, failure in self.failures.items())
        )


class RankPool:
    """``size`` worker processes that form one gloo (or NCCL) group."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        # NCCL wants CUDA, which is started in a process of its own from the beginning.
        context = forks.context() if self.backend == "gloo" else mp.get_context("spawn")
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
            JobError: it raised on some rank, or a rank ended. Ranks that are still at work :data:`GRACE_S` later
                wait, perhaps, for the one that failed: the pool is killed.
            TimeoutError: it did not end in time; the pool is killed.
        """
        if not self._processes:
            self._start()
        job = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        deadline = time.monotonic() + timeout
        pending = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pending.pop(pipe)
                results[rank], failure = self._answer(rank)
                if failure is not None:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if pending or any(failure.error == "exit" for failure in failures.values()):
            self.close()
        if failures:
            raise JobError(failures)
        if pending:
            raise TimeoutError(
                f"ranks {sorted(pending.values())} of {self.size} did not finish within {timeout} s"
            )
        return [results[rank] for rank in range(self.size)]

    def _answer(self, rank: int) -> tuple[Any, Failure | None]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join()
            message = f"rank {rank} ended with exit code {self._processes[rank].exitcode}"
            return None, Failure("exit", message, message, False)

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
