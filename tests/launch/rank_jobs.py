"""What the ranks of tests/launch/test_ranks.py do; a module of its own, because started ranks import it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from pathlib import Path

import torch

from tp_mamba.launch.prompts import share_prompts
from tp_mamba.launch.ranks.start import make_tensor_parallel
from tp_mamba.parallel.group import TensorParallel


def add_ranks(offset: int) -> tuple[int, float, int]:
    """Every rank contributes its number; rank 0's result, and its number of threads, reach the launcher."""
    tp = make_tensor_parallel("cpu", None)
    return tp.size, float(tp.all_reduce_(torch.tensor([float(tp.rank + offset)]))), torch.get_num_threads()


def count_threads() -> int:
    """The threads of a process that works on a CPU."""
    make_tensor_parallel("cpu", None)
    return torch.get_num_threads()


def reduce_for_ever(victim: int, fault: str, after: int) -> None:
    """All ranks reduce without end; after ``after`` rounds rank ``victim`` meets its ``fault``."""
    tp = TensorParallel.from_env("gloo")
    for step in range(1_000_000):
        if tp.rank == victim and step == after:
            meet(fault)
        tp.all_reduce_(torch.ones(4))


def meet(fault: str) -> None:
    """End this process's work in one of the ways that a rank may end; leave the time in FAULT_TIME's file.

    Two of them say who notices first. Of "kill unnoticed" the launcher tells the other ranks, which are asleep in
    ``sleep_through``; of "hang up" they have to tell the launcher, for this process stays.
    """
    while fault == "kill unnoticed" and not _asleep().exists():
        time.sleep(0.01)
    Path(os.environ["FAULT_TIME"]).write_text(str(time.time()))
    if fault == "raise":
        raise ValueError("the weights of this rank are bad")
    if fault in ("kill", "kill unnoticed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(7)
    if fault == "leave":
        os._exit(0)
    if fault == "hang up":
        _hang_up()
        time.sleep(600)


def sleep_through() -> None:
    """Wait where Python runs no signal handler, as in a collective, once the victim has been let know."""
    _asleep().touch()
    mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)  # without end; a sleep or a lock of Python's would run the handler


def _asleep() -> Path:
    return Path(os.environ["FAULT_TIME"]).with_name("asleep")


def _hang_up() -> None:
    for link in Path("/proc/self/fd").iterdir():
        if link.is_socket() and int(link.name) > 2:
            with contextlib.suppress(
                OSError
            ):  # a socket that is gone meanwhile, or without anyone at its other end
                end = socket.socket(fileno=os.dup(int(link.name)))
                # One that listens is left: gloo aborts the process that it is taken from.
                if not end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    end.shutdown(socket.SHUT_RDWR)


def fail_while_others_wait(victim: int) -> None:
    """Rank ``victim`` raises before it has joined; the others wait for it in the rendezvous."""
    if int(os.environ["RANK"]) == victim:
        raise ValueError("no such checkpoint")
    TensorParallel.from_env("gloo").all_gather_object(None)


def share_from(folders: list[str], file: str) -> list[list[str]]:
    """Every rank starts in a folder of its own, as on hosts with other disks; rank 0 tells what all have got."""
    tp = TensorParallel.from_env("gloo")
    os.chdir(folders[tp.rank])
    return tp.all_gather_object(share_prompts(["of the command"], [file], tp))


def all_raise(last: int) -> None:
    """Every one of two ranks raises an error of its own, rank ``last`` once the other has sent its own and ended."""
    rank, place = int(os.environ["RANK"]), Path(os.environ["FAULT_TIME"])
    if rank == last:
        while not place.exists():
            time.sleep(0.001)
        while _runs(int(place.read_text())):
            time.sleep(0.001)
    else:
        scratch = place.with_suffix(".part")
        scratch.write_text(str(os.getpid()))
        scratch.rename(place)  # found whole or not at all
    raise ValueError(f"error of rank {rank}")


def _runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has asked after yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def sleep_for_ever() -> None:
    """Wait to be ended."""
    TensorParallel.from_env("gloo").all_gather_object(None)
    os.write(1, b"started\n")  # in one piece: print may write its newline apart, between those of other ranks
    time.sleep(600)
