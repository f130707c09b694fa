"""What a training run is made of between two steps, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tp_mamba.training.data_parallel import Master
from tp_mamba.training.optimizer import MOMENTS
from tp_mamba.training.ranks import Ranks


def _held(
    masters: Sequence[Master], optimizer: torch.optim.Optimizer | None
) -> dict[str, tuple[Master, torch.Tensor]]:
    """Key in a checkpoint -> whose it is, and this rank's part, padding included."""
    found = {f"model.{master.name}": (master, master.local.detach()) for master in masters}
    if optimizer is not None:
        for master in masters:
            for name in MOMENTS:
                found[f"optimizer.{name}.{master.name}"] = (master, optimizer.state[master.local][name])
    return found


def copy_out(
    masters: Sequence[Master], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, torch.Tensor]:
    """A copy on the CPU of the parameters and the optimizer's moments, described for all ranks."""
    return {
        key: master.layout.describe(_cpu_copy(master.layout.view(held)), ranks)
        for key, (master, held) in _held(masters, optimizer).items()
    }


def room_for(
    masters: Sequence[Master], optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors for a checkpoint to be read into, described for all ranks, and the memory below each."""
    rooms = {
        key: torch.empty(master.layout.view(held).shape, dtype=held.dtype)
        for key, (master, held) in _held(masters, optimizer).items()
    }
    described = {
        key: master.layout.describe(rooms[key], ranks)
        for key, (master, _) in _held(masters, optimizer).items()
    }
    return described, rooms


def copy_in(
    masters: Sequence[Master], optimizer: torch.optim.Optimizer | None, rooms: dict[str, torch.Tensor]
) -> None:
    """Take over what was read into the memory of :func:`room_for`."""
    for key, (master, held) in _held(masters, optimizer).items():
        master.layout.view(held).copy_(rooms[key])


def _cpu_copy(view: torch.Tensor) -> torch.Tensor:
    return torch.empty(view.shape, dtype=view.dtype, device="cpu").copy_(view)
