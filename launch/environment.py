"""Which ranks there are: this process alone, or those that torchrun (or ``--tp``) has started."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

from tp_mamba.launch.failures import UsageError

if TYPE_CHECKING:
    import torch

    from tp_mamba.parallel.group import TensorParallel

BACKENDS: dict[str | None, str] = {"cpu": "gloo", "cuda": "nccl"}
"""How ranks on a device communicate."""

LEAVE_S = 10.0
"""How long a failed rank may take to leave its process group before it is ended without ceremony."""


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of ``--dtype``; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def under_torchrun() -> bool:
    """True in a process that torchrun, or :mod:`tp_mamba.launch.ranks`, started as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def resolve_rank_count(asked: int | str | None, device: str | None) -> int:
    """How many ranks to run: ``--tp``, the GPUs of this host for ``auto``, or what torchrun has started.

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


def check_device(device: str | None, backend: str | None) -> None:
    """Refuse a device and a backend that do not go together, or that this host does not have.

    Raises:
        UsageError: the backend cannot serve the device.
        ValueError: there is no GPU, and one is needed.
    """
    import torch

    wanted = BACKENDS.get(device)
    if backend is not None and wanted is not None and backend != wanted:
        raise UsageError(
            f"--device {device} with --backend {backend}: {device} ranks communicate through {wanted}"
        )
    if (device == "cuda" or backend == "nccl") and not torch.cuda.is_available():
        asked = "--device cuda" if device == "cuda" else "--backend nccl"
        raise ValueError(
            f"{asked} on a host where torch finds no GPU: use --device cpu, or a torch built for this GPU"
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
        ValueError: as :func:`check_device`.
    """
    import torch

    from tp_mamba.parallel.group import TensorParallel

    check_device(device, backend)
    if under_torchrun():
        tp = TensorParallel.from_env(backend or BACKENDS.get(device))
    else:
        tp = TensorParallel(device=device or ("cpu" if backend == "gloo" else None))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if tp.device.type == "cpu" and local_ranks > 1:
        # Ranks on one host would each take every core and fight over them; or one, as torchrun has it. A process on
        # its own keeps what torch, or OMP_NUM_THREADS, has chosen.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    return tp


def in_process_group() -> bool:
    """Whether this process has joined the other ranks."""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def leave_process_group(*, failed: bool) -> None:
    """Destroy this process's group, if it has joined one.

    After a failure the other ranks may still wait inside a collective and the backend for them; the launcher
    ends them as soon as this process is gone, so it must not stay.
    """
    if not in_process_group():
        return
    import torch.distributed as dist

    if failed:
        deadline = threading.Timer(LEAVE_S, os._exit, (1,))
        deadline.daemon = True
        deadline.start()
    dist.destroy_process_group()
