"""The two axes that training runs over: data (``M`` ranks) and tensor parallelism (``n`` ranks)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tp_mamba.parallel.group import TensorParallel

DATA, TENSOR = "dp", "tp"
"""Names of the axes of the mesh."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """All ranks of a training run as a mesh ``[M, n]``; those of one row share one model."""

    world: TensorParallel
    """Every rank."""
    dp: TensorParallel
    """The ranks that hold the same slice of the model and read other data."""
    tp: TensorParallel
    """The ranks that one model is split over."""
    mesh: DeviceMesh | None
    """On the device that computes; None for a process on its own."""
    files: DeviceMesh | None
    """The same mesh on the CPU, which checkpoints are described by."""
    file_group: dist.ProcessGroup | None
    """All ranks over gloo, for the thread that writes checkpoints alone."""

    @property
    def is_owner(self) -> bool:
        """Whether this is the one rank that writes what is written once, and prints."""
        return self.world.rank == 0


def make_ranks(world: TensorParallel, n: int) -> Ranks:
    """Lay the ranks of ``world`` out for models over ``n`` ranks each; every rank calls this.

    Raises:
        ValueError: the number of ranks is no multiple of ``n``.
    """
    if n < 1 or world.size % n:
        raise ValueError(
            f"{world.size} rank{'s' * (world.size > 1)} cannot be {n} tensor-parallel ranks times a number of data "
            "ranks: give a --tp that divides the number of ranks"
        )
    if world.group is None:
        alone = TensorParallel(device=world.device)
        return Ranks(world, alone, alone, None, None, None)
    shape, names = (world.size // n, n), (DATA, TENSOR)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    files = mesh
    if world.device.type != "cpu":
        files = init_device_mesh(
            "cpu", shape, mesh_dim_names=names, backend_override={DATA: "gloo", TENSOR: "gloo"}
        )
    dp, tp = (TensorParallel(mesh.get_group(name), device=world.device) for name in names)
    return Ranks(world, dp, tp, mesh, files, dist.new_group(backend="gloo"))
