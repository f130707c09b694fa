"""Memory of the GPUs of one host that all ranks of a group map: the one module that touches torch's symmetric memory.

That is alpha in every release so far; the names used here are the same from torch 2.11 to 2.14. What is known to go
wrong with it, and how it is kept from doing so:

* Its signal pads are shared between groups, and its own collectives hang from two streams: neither is used. Whatever
  our kernels wait for lies in memory that is one group's alone.
* A pool of such memory may pair pieces of different age on different ranks. So there is one allocation per group, made
  once, never freed.
* A rendezvous is made by all ranks of a group together. It must not be one of groups that overlap, the larger after
  the smaller: the ranks of the smaller are then a rendezvous ahead, and the larger one hangs. Groups of tensor
  parallelism, as those of a device mesh, are disjoint.
* NVLink multicast is not used, and switched off before the rendezvous would set it up.
* Nsight Systems hangs in replays of graphs that wait for other ranks: profile eager calls.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tp_mamba.kernels.all_reduce import Exchange
from tp_mamba.kernels.all_reduce.layout import (
    MAX_RANKS,
    ROWS_BYTES,
    inbox_bytes,
    most_programs,
    terms_bytes,
)
from tp_mamba.kernels.all_reduce.shares import Shares
from tp_mamba.kernels.common.device import device_properties

_kept: list[tuple[Exchange, list[torch.Tensor], object]] = []
"""Every exchange, the ranks' inboxes, and torch's handle: a peer may write to them as long as this process lives."""


class UnreachableError(RuntimeError):
    """The ranks of a group cannot write to one another's memory; the message is the cause."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one rank sees of where it computes, before any memory is shared."""

    host: str
    gpu: str
    """Its GPU, by UUID; empty where it has none that serves."""
    reached: tuple[str, ...]
    """The GPUs it sees whose memory its own reaches."""
    hidden: tuple[str, ...]
    """Those that it sees and does not reach."""
    sm_count: int


def see(device: torch.device) -> Seen:
    """What this rank sees."""
    host = f"{socket.gethostname()} {_boot_id()}"
    if not torch.cuda.is_available() or torch.version.cuda is None or device.type != "cuda":
        return Seen(host, "", (), (), 0)
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    own = torch.cuda.current_device() if device.index is None else device.index
    others = {uuid: i for i, uuid in enumerate(uuids) if i != own}
    reached = {uuid for uuid, i in others.items() if torch.cuda.can_device_access_peer(own, i)}
    return Seen(
        host,
        uuids[own],
        tuple(sorted(reached)),
        tuple(sorted(set(others) - reached)),
        device_properties(device).sm_count,
    )


def reason_against(ranks: Sequence[Seen]) -> str | None:
    """Why these ranks do not share memory, as far as can be told before it is tried; None if they may."""
    gpus = [seen.gpu for seen in ranks]
    if len(ranks) > MAX_RANKS:
        return f"{len(ranks)} ranks are more than the {MAX_RANKS} that may reach one another's memory"
    if len({seen.host for seen in ranks}) > 1:
        return "the ranks are on several hosts"
    if not all(gpus):
        return f"rank {gpus.index('')} has no NVIDIA GPU"
    if len(set(gpus)) < len(gpus):
        return "several ranks share a GPU"
    for rank, seen in enumerate(ranks):
        for other, gpu in enumerate(gpus):
            if gpu in seen.hidden:
                return f"the GPU of rank {rank} does not reach the memory of rank {other}'s"
    return None


def _boot_id() -> str:
    """What tells hosts of one name apart, where Linux says it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def open_memory(group: dist.ProcessGroup, device: torch.device, sm_count: int) -> tuple[Exchange, Shares]:
    """Allocate what this rank's sums pass through, and map that of the others; all ranks of ``group`` call this.

    Args:
        sm_count: the SMs of the least of the ranks' GPUs.

    Raises:
        UnreachableError: torch cannot map it; the others may have been able to.
    """
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    programs = most_programs(size, sm_count)
    words = inbox_bytes(size, 1)
    parts = (inbox_bytes(size, programs), words, words, terms_bytes(size), ROWS_BYTES)
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        memory = symmetric_memory.empty(sum(parts), dtype=torch.uint8, device=device)
        memory.fill_(255)
        torch.cuda.synchronize(device)
        handle = symmetric_memory.rendezvous(memory, group)
        mapped = [handle.get_buffer(peer, (memory.numel(),), torch.uint8) for peer in range(size)]
    except Exception as error:
        raise UnreachableError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if len(mapped) != size or not all(whole.data_ptr() for whole in mapped) or handle.rank != rank:
        raise UnreachableError("torch mapped no memory of some rank")
    inboxes, terms_sent, rows_sent, terms, rows = zip(*(whole.split(parts) for whole in mapped), strict=True)

    def exchange(inboxes: Sequence[torch.Tensor], programs: int) -> Exchange:
        return Exchange(rank, _addresses(inboxes), torch.zeros(programs, dtype=torch.int32, device=device))

    opened = exchange(inboxes, programs)
    shares = Shares(terms, rows, exchange(terms_sent, 1), exchange(rows_sent, 1))
    _kept.append((opened, list(inboxes), (memory, mapped, handle)))
    return opened, shares


def _addresses(mapped: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([each.data_ptr() for each in mapped], dtype=torch.int64, device=mapped[0].device)


def inboxes_of(exchange: Exchange) -> list[torch.Tensor]:
    """The inboxes of all ranks, ``[bytes]`` uint8 each, as this rank reaches them."""
    return next(inboxes for known, inboxes, _ in _kept if known is exchange)
