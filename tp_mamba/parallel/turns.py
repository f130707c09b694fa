"""One thread at a time over a process group.

Collectives of one group meet in the order in which each rank issues them. Two threads that issue their own have
another order on every rank, so that a sum of one meets a gathering of the other: the ranks hang, or mix results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from tp_mamba.parallel.group import TensorParallel


@dataclass(slots=True)
class _Holder:
    """Who uses a group at the moment."""

    thread: int
    uses: int = 0


_lock = threading.Lock()
_holders: dict[dist.ProcessGroup, _Holder] = {}


def hold(tp: TensorParallel, what: str) -> Callable[[], None]:
    """Take the group of ``tp`` for this thread; call what comes back, once, to let it go (on any thread).

    A thread that holds a group may take it again: what one thread does comes in one order, the same on every rank
    of a program that does the same there. A single rank without a group communicates with nobody and is never held.

    Args:
        what: what the group is wanted for, for the message.

    Raises:
        ValueError: another thread holds it.
    """
    group, thread = tp.group, threading.get_ident()
    if group is None:
        return lambda: None
    with _lock:
        holder = _holders.setdefault(group, _Holder(thread))
        if holder.thread != thread:
            raise ValueError(
                f"{what} over a process group that another thread is generating over: let that end first, or give "
                "this thread a group (torch.distributed.new_group) and a model of its own"
            )
        holder.uses += 1

    def release() -> None:
        with _lock:
            holder.uses -= 1
            if not holder.uses:
                del _holders[group]

    return release
