"""Joining the ranks that a launcher started: one backend for all of them, and a GPU for each.

A rank knows its own host only. So every rank writes what it sees into the store that the launcher's address leads to,
reads what all others wrote, and all come to the same decision, or to the same refusal.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout


@dataclass(frozen=True, slots=True)
class Seen:
    """What one rank sees before it has a group."""

    host: str
    gpus: tuple[str, ...]
    """The GPUs that are visible to it, by index or as ``CUDA_VISIBLE_DEVICES`` names them."""
    local_rank: int | None
    """The launcher's ``LOCAL_RANK``; None where there is none, or none that is a number."""
    backend: str | None
    """The backend that its program asks for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank computes, and what all ranks communicate through."""

    backend: str
    gpu: int | None
    """Index among its visible GPUs; None computes on the CPU."""


def see(backend: str | None, environ: Mapping[str, str] | None = None) -> Seen:
    """What this process sees; initialises no GPU."""
    environ = os.environ if environ is None else environ
    count = torch.cuda.device_count()
    named = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    gpus = named[:count] if len(named) >= count else [str(i) for i in range(count)]
    local = environ.get("LOCAL_RANK", "")
    return Seen(socket.gethostname(), tuple(gpus), int(local) if local.isdigit() else None, backend)


def decide(ranks: Sequence[Seen]) -> list[Place]:
    """The place of every rank: NCCL where each has a GPU of its own, gloo where none sees any.

    Raises:
        ValueError: the ranks ask for different backends; or there are GPUs, but not one for each rank, and gloo was
            not asked for.
    """
    asked = {seen.backend for seen in ranks}
    if len(asked) > 1:
        first = next(rank for rank, seen in enumerate(ranks) if seen.backend != ranks[0].backend)
        raise ValueError(
            f"rank 0 asks for backend={ranks[0].backend!r} and rank {first} for {ranks[first].backend!r}: give every "
            "rank the same"
        )
    backend = asked.pop()
    if backend == "gloo" or (backend is None and not any(seen.gpus for seen in ranks)):
        return [Place("gloo", None)] * len(ranks)
    gpus: dict[int, int | None] = {}
    for host, local in _by_host(ranks).items():
        given = _give_gpus([ranks[rank] for rank in local])
        if given is None:
            found = len({gpu for rank in local for gpu in ranks[rank].gpus})
            raise ValueError(
                f"{len(local)} rank{'s' * (len(local) > 1)} on {host} but {found} GPU{'s' * (found != 1)}: NCCL needs "
                'a GPU for each rank; start fewer ranks there, or use backend="gloo" to compute on the CPU'
            )
        gpus.update(zip(local, given, strict=True))
    return [Place("nccl", gpus[rank]) for rank in range(len(ranks))]


def _by_host(ranks: Sequence[Seen]) -> dict[str, list[int]]:
    order = sorted(range(len(ranks)), key=lambda rank: (ranks[rank].host, rank))
    return {host: list(local) for host, local in groupby(order, key=lambda rank: ranks[rank].host)}


def _give_gpus(ranks: Sequence[Seen]) -> list[int] | None:
    """A GPU for each rank of one host, by its index among those the rank sees; None if they do not suffice."""
    if len({seen.gpus for seen in ranks}) > 1:  # the launcher has shown each rank its own
        own = [seen.gpus[0] for seen in ranks if seen.gpus]
        return [0] * len(ranks) if len(set(own)) == len(ranks) else None
    if len(ranks[0].gpus) < len(ranks):
        return None
    local = [seen.local_rank for seen in ranks]
    if sorted(-1 if rank is None else rank for rank in local) == list(range(len(ranks))):
        return [rank for rank in local if rank is not None]
    return list(range(len(ranks)))


def join(backend: str | None, timeout: timedelta | None) -> Place:
    """Initialise ``torch.distributed`` over the ranks of the environment, and say where this one computes.

    Raises:
        ValueError: as :func:`decide`, with the same sentence on every rank.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout or default_pg_timeout))
    seen = dist.PrefixStore("tp_mamba", store)
    seen.set(str(rank), json.dumps(asdict(see(backend))))
    facts = [json.loads(seen.get(str(other))) for other in range(size)]
    if seen.add("read", 1) == size:
        seen.set("all_read", "")
    if rank == 0:  # the store may end with it: where it refuses, the others must have read why
        seen.wait(["all_read"])
    place = decide([Seen(**{**fact, "gpus": tuple(fact["gpus"])}) for fact in facts])[rank]
    if place.gpu is not None:
        torch.cuda.set_device(place.gpu)
    # device_id would create the NCCL communicator at once; it is left out so that a process that only reads a
    # checkpoint never builds one.
    dist.init_process_group(
        place.backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout
    )
    return place


def use_own_gpu() -> int:
    """Make the launcher's ``LOCAL_RANK`` the current GPU, where it numbers one that is visible; the current GPU."""
    local = os.environ.get("LOCAL_RANK", "")
    if local.isdigit() and int(local) < torch.cuda.device_count():
        torch.cuda.set_device(int(local))
    return torch.cuda.current_device()


def backend_of(group: dist.ProcessGroup | None, device_type: str) -> str | None:
    """The backend that serves tensors on ``device_type`` in ``group`` (None: the default group); None if none does.

    torch names a group of several backends, or of none that was asked for, "undefined" or by the whole list.
    """
    pairs = (pair.partition(":") for pair in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in pairs}.get(device_type)
