"""The ranks of one host: started as processes, ended together, their first error raised; and which ranks there are."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.ranks.failures import (
    GRACE_S,
    LaunchError,
    RankFailure,
    UsageError,
    in_process_group,
    under_torchrun,
)
from tp_mamba.launch.ranks.signals import (
    STOPPING,
    StoppedError,
    handled,
    kept_from_children,
    raising_stopped,
)

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

BACKENDS: dict[str | None, str] = {"cpu": "gloo", "cuda": "nccl"}
"""How ranks on a device communicate."""

LEAVE_S = 10.0
"""How long a rank may take to end, after its work or a failure."""


LAST_S = 20.0
"""How long rank 0 may take to end in its own time, after another rank has failed."""

RANK_LOST = signal.SIGUSR1
"""What tells a rank 0 that ends in its own time that another rank has failed."""


def start_ranks(work: Callable[..., Any], *args: Any, size: int, ends_itself: bool = False) -> Any:
    """Run ``work(*args)`` in ``size`` new processes with torchrun's environment; return rank 0's result.

    Args:
        work: a function at the top level of a module; it and ``args`` are pickled.
        size: number of ranks, all on this host.
        ends_itself: rank 0 is not killed but asked to end: by SIGTERM when a signal asks this process to stop, a
            second one of which kills; by :data:`RANK_LOST`, with :data:`LAST_S` to do it in, when another rank fails.

    Raises:
        LaunchError: a rank raised, was killed or exited; the others have ended too.
        StoppedError: SIGINT, SIGTERM, SIGHUP or SIGQUIT reached this process; all ranks have ended.
    """
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("spawn")
    # The ranks meet at a store of this process: a port that is taken here cannot be lost to another program.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    names = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    names |= {"TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    ranks: list[tuple[Connection, SpawnProcess]] = []
    with raising_stopped():
        try:
            with kept_from_children():
                for rank in range(size):
                    environment = names | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    ours, theirs = context.Pipe(duplex=False)
                    given = (environment, theirs, work, args)
                    process = context.Process(target=_rank_main, args=given, daemon=True)
                    process.start()
                    ranks.append((ours, process))
                    theirs.close()  # so that the pipe ends with the process
            result = _collect_from_one_that_ends(ranks) if ends_itself else _collect(ranks)
            for _, process in ranks:
                process.join(LEAVE_S)
            return result
        finally:
            for pipe, process in ranks:
                process.kill()
                process.join()
                pipe.close()


def _collect_from_one_that_ends(ranks: Sequence[tuple[Connection, SpawnProcess]]) -> Any:
    """:func:`_collect`, with a rank 0 that ends in its own time."""
    first = ranks[0][1]
    asked: list[int] = []

    def ask(signum: int, _: object) -> None:
        if asked:
            raise StoppedError(signum)
        asked.append(signum)
        if first.is_alive() and first.pid is not None:
            os.kill(first.pid, signal.SIGTERM)

    with handled(ask, *STOPPING):
        try:
            return _collect(ranks)
        except LaunchError:
            if asked:  # perhaps before it could serve: then it has ended like any process
                raise StoppedError(asked[0]) from None
            if first.is_alive() and first.pid is not None:
                os.kill(first.pid, RANK_LOST)
                first.join(LAST_S)
            raise


def _rank_main(
    environment: dict[str, str], pipe: Connection, work: Callable[..., Any], args: Sequence[Any]
) -> None:
    """One rank: do the work, and send its result or its failure."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, name="waits for the launcher's end", daemon=True).start()
    try:
        pipe.send(work(*args))
    except BaseException as error:
        pipe.send(RankFailure.of(error, int(environment["RANK"])))
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _collect(ranks: Sequence[tuple[Connection, SpawnProcess]]) -> Any:
    """Rank 0's result, once every rank has sent its own.

    Raises:
        LaunchError: the first error of any, as soon as it is known. A rank that only lost contact may be heard
            before the one that broke, which has :data:`GRACE_S` to be heard too.
    """
    pending = {pipe: rank for rank, (pipe, _) in enumerate(ranks)}
    failures: list[RankFailure] = []
    result = None
    while pending and all(failure.consequence for failure in failures):
        ready = wait(list(pending), GRACE_S if failures else None)
        if not ready:
            break
        for pipe in ready:
            rank = pending.pop(pipe)  # type: ignore[call-overload]
            outcome = _receive(rank, *ranks[rank])
            if isinstance(outcome, RankFailure):
                failures.append(outcome)
            elif rank == 0:
                result = outcome
    if failures:
        raise LaunchError(first_of(failures))
    return result


def _receive(rank: int, pipe: Connection, process: SpawnProcess) -> Any:
    """What ``rank`` sent, or how it ended without a word."""
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return RankFailure.of_exit(rank, process.exitcode or 0)


def first_of(failures: Sequence[RankFailure]) -> RankFailure:
    """The failure to show: causes before consequences, then the earliest."""
    return min(failures, key=lambda failure: (failure.consequence, failure.timestamp))


def resolve_rank_count(asked: int | str | None, device: str | None) -> int:
    """How many ranks to run: ``--tp``, the GPUs of this host for ``auto``, or what torchrun has started.

    Nothing but ``auto`` imports torch.

    Raises:
        UsageError: torchrun has started another number of ranks than ``--tp`` asks for.
    """
    if under_torchrun():
        world = int(os.environ["WORLD_SIZE"])
        if isinstance(asked, int) and asked != world:
            raise UsageError(
                f"--tp {asked} under torchrun with {world} ranks: leave --tp out, "
                f"or start torchrun with {asked} ranks"
            )
        return world
    if asked == "auto":
        import torch

        return 1 if device == "cpu" else max(1, torch.cuda.device_count())
    return asked if isinstance(asked, int) else 1


def check_device_arguments(device: str | None, backend: str | None) -> None:
    """Refuse a device and a backend that do not go together. Imports nothing.

    Raises:
        UsageError: the backend cannot serve the device.
    """
    wanted = BACKENDS.get(device)
    if backend is not None and wanted is not None and backend != wanted:
        raise UsageError(
            f"--device {device} with --backend {backend}: {device} ranks communicate through {wanted}"
        )


def check_device(device: str | None, backend: str | None, ranks: int) -> None:
    """Refuse what this host's GPUs cannot serve, ``ranks`` that are to start here included.

    A CPU computes where it was asked for, or where there is no GPU; never because there are too few.

    Raises:
        ValueError: there is no GPU and one is needed, or there are fewer than ranks.
    """
    import torch

    gpus = torch.cuda.device_count()
    if (device == "cuda" or backend == "nccl") and not gpus:
        asked = "--device cuda" if device == "cuda" else "--backend nccl"
        raise ValueError(
            f"{asked} on a host where torch finds no GPU: use --device cpu, or a torch built for this GPU"
        )
    # Under torchrun the ranks of a host are known to the ranks alone: TensorParallel.from_env looks at them.
    if device != "cpu" and backend != "gloo" and 0 < gpus < ranks and not under_torchrun():
        raise ValueError(
            f"--tp {ranks} on a host with {gpus} GPU{'s' * (gpus > 1)}, and each rank needs its own: use --tp {gpus}, "
            "or --device cpu to compute on the CPU"
        )


def check_ranks(checkpoint: str, n: int) -> None:
    """Refuse, before any rank starts, what ``n`` ranks would refuse when they build their model.

    Raises:
        ValueError: config.json is not that of a model this package runs, or there are too many ranks for it.
    """
    from tp_mamba.config import MambaConfig
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.parallel.group import TensorParallel

    MambaForCausalLM(MambaConfig.from_pretrained(checkpoint), tp=TensorParallel.virtual(0, n), device="meta")


def make_tensor_parallel(device: str | None, backend: str | None) -> TensorParallel:
    """This process's :class:`TensorParallel`: torchrun's ranks if it started this process, else one rank.

    Without a device given, gloo means a CPU, at one rank as at several.

    Raises:
        ValueError: as :func:`check_device` and :meth:`TensorParallel.from_env`.
    """
    import torch

    from tp_mamba.parallel.group import TensorParallel

    check_device(device, backend, 1)
    if under_torchrun():
        tp = TensorParallel.from_env(backend or BACKENDS.get(device))
    else:
        tp = TensorParallel(device=device or ("cpu" if backend == "gloo" else None))
    local_ranks = 1
    if tp.device.type == "cpu" and tp.size > 1:
        # SLURM and mpirun do not set LOCAL_WORLD_SIZE; the devices of all ranks are alike, so all come here.
        hosts = tp.all_gather_object(platform.node())
        local_ranks = hosts.count(hosts[tp.rank])
    if local_ranks > 1:
        # Ranks on one host would each take every core and fight over them; or one, as torchrun has it. A process on
        # its own keeps what torch, or OMP_NUM_THREADS, has chosen.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    return tp


def leave_in_time() -> None:
    """End this process, which has failed, within :data:`LEAVE_S`.

    The other ranks may still wait inside a collective, and the backend for them when the process group is taken
    down at exit; torchrun ends them as soon as this process is gone.
    """
    if in_process_group():
        deadline = threading.Timer(LEAVE_S, os._exit, (1,))
        deadline.daemon = True
        deadline.start()
