"""The tensor-parallel group: which ranks share a model, and which of them this process is."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.environment import backend_of, join, use_own_gpu
from tp_mamba.parallel.fused import FusedCommunicator, is_wanted


def _leave(tp: TensorParallel) -> None:
    """End the group that ``from_env`` made, unless the program has done so.

    A gloo thread that runs on while the interpreter is taken down may abort the process. The threads end with the
    last reference to the group, which ``tp`` itself may be.
    """
    tp.group = None
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


class RankFailedError(RuntimeError):
    """Another rank of the tensor-parallel group failed; the message names the rank and its error."""


class TensorParallel:
    """The process group over which one model is split, passed explicitly to whatever communicates.

    There is no global parallel state. Without a group it stands for one rank, on which every collective is
    the identity, so single-device code needs no branch of its own.

    Attributes:
        group: the process group, or None for one rank.
        size: number of ranks ``n``.
        rank: this process's position in the group, ``0 <= rank < size``.
        device: where this rank computes.
        communicator: how the ranks communicate, and how a sum over them is finished.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """Wrap ``group``; None is one rank.

        Args:
            group: an initialised process group this process belongs to.
            device: where this rank computes. By default the current GPU where NCCL serves CUDA in ``group``, else the
                CPU for a group, and for no group the GPU if there is one.
            communicator: how the ranks communicate and finish sums. By default by fused kernels where NCCL serves
                ``device`` in ``group``, unless ``TP_MAMBA_FUSED_ALL_REDUCE=0`` (:mod:`tp_mamba.parallel.fused`), else
                by plain collectives.

        Raises:
            ValueError: ``group`` is no process group, or this process is not a member of it; or that variable is
                neither 0 nor 1.
        """
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"got {group!r} for a process group: pass a torch.distributed.ProcessGroup, or nothing for one rank"
            )
        self.group = group
        self.size, self.rank = 1, 0
        if group is not None:
            self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
            if self.rank < 0:
                raise ValueError(
                    f"global rank {dist.get_rank()} is not a member of the given process group: "
                    "pass the group that this process belongs to"
                )
        self.device = torch.device(device) if device is not None else self._default_device()
        self.communicator = self._default_communicator() if communicator is None else communicator

    def _default_communicator(self) -> Communicator:
        if self.group is not None and self.device.type == "cuda" and self.backend == "nccl" and is_wanted():
            return FusedCommunicator()
        return Communicator()

    def _default_device(self) -> torch.device:
        if torch.cuda.is_available() and (self.group is None or backend_of(self.group, "cuda") == "nccl"):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> TensorParallel:
        """The group of a one-dimensional mesh, for example ``TensorParallel.from_mesh(mesh["tp"])``.

        Raises:
            ValueError: ``mesh`` has more than one axis.
        """
        if mesh.ndim != 1:
            raise ValueError(
                f"got a mesh with {mesh.ndim} axes {mesh.mesh_dim_names}: tensor parallelism runs over one axis, "
                'select it by name, as in TensorParallel.from_mesh(mesh["tp"])'
            )
        return cls(mesh.get_group())

    @classmethod
    def from_env(cls, backend: str | None = None, *, timeout: timedelta | None = None) -> TensorParallel:
        """All ranks that torchrun started; one rank where torchrun did not start this process.

        Initialises ``torch.distributed`` if that has not been done: with NCCL where every rank has a GPU of its own,
        which becomes its current one, and with gloo where no rank has any. The ranks agree on it through the store
        of the launcher. What it initialises it also ends, when the program does.

        Args:
            backend: ``"nccl"`` or ``"gloo"``; by default chosen as above, or what is initialised already.
            timeout: how long a rank, or a collective, may wait for the others (torch's default if None).

        Raises:
            ValueError: GPUs, but not one for each rank, and gloo was not asked for; ranks that ask for different
                backends; another backend than the one that is initialised.
        """
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            if backend == "nccl" and not torch.cuda.is_available():
                raise ValueError('backend="nccl" but torch finds no GPU: use backend="gloo", or leave it out')
            return cls(device="cpu" if backend == "gloo" else None)
        if not dist.is_initialized():
            place = join(backend, timeout)
            tp = cls(dist.group.WORLD, device="cpu" if place.gpu is None else torch.device("cuda", place.gpu))
            atexit.register(_leave, tp)
            return tp
        group = dist.group.WORLD
        serving = [backend_of(group, device) for device in ("cpu", "cuda")]
        if backend is not None and backend not in serving:
            initialized = " and ".join(sorted({repr(name) for name in serving if name}))
            raise ValueError(
                f"backend={backend!r} but torch.distributed is initialised with {initialized}: "
                "leave backend out, or do not initialise torch.distributed before"
            )
        if backend == "gloo" or backend_of(group, "cuda") != "nccl":
            return cls(group, device="cpu")
        return cls(group, device=torch.device("cuda", use_own_gpu()))

    @classmethod
    def virtual(cls, rank: int, size: int) -> TensorParallel:
        """Rank ``rank`` of ``size`` without processes: for shapes, plans and splitting files.

        Collectives on it raise RuntimeError, because there is nobody to talk to.

        Raises:
            ValueError: ``size < 1`` or ``rank`` outside ``0..size-1``.
        """
        if size < 1 or not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size} does not exist: need size >= 1 and 0 <= rank < size")
        tp = cls(device="cpu")
        tp.rank, tp.size = rank, size
        return tp

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        """Itself: copies of a model communicate over the same group."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as rank and size, without the group: a process group is of one run of one program."""
        return _unpickled, (self.rank, self.size, self.device, self.communicator)

    @property
    def backend(self) -> str:
        """What serves :attr:`device`: ``"nccl"`` or ``"gloo"``; ``"none"`` for one rank without a group."""
        return "none" if self.group is None else str(backend_of(self.group, self.device.type))

    def __repr__(self) -> str:
        where = f"backend={self.backend!r}, device={str(self.device)!r}"
        return f"TensorParallel(rank={self.rank}, size={self.size}, {where})"

    def process_group(self) -> dist.ProcessGroup:
        """:attr:`group`, where there is one.

        Raises:
            RuntimeError: there is none.
        """
        if self.group is None:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} has no process group (it was made by TensorParallel.virtual, or "
                "unpickled): it can plan and slice, but not communicate; build or load the model over a group, such as "
                "TensorParallel.from_env() under torchrun"
            )
        return self.group

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` (any shape, contiguous) over the ranks, in place, and return it."""
        return x if self.size == 1 else self.communicator.all_reduce_(x, self)

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate every rank's ``x`` (equal shapes, at least one dimension) along ``dim`` in rank order."""
        if self.size == 1:
            return x
        gathered = self.communicator.all_gather(x.contiguous(), self)
        if dim % x.dim() == 0:
            return gathered.flatten(0, 1)
        return torch.cat(gathered.unbind(0), dim=dim)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the ranks and keep this rank's of ``n`` equal shares of its rows (a multiple of ``n``)."""
        return x if self.size == 1 else self.communicator.reduce_scatter(x.contiguous(), self)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (picklable, small) in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group())
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` (picklable, small) on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.process_group(), group_src=0)
        return values[0]

    def agree(self, error: BaseException | None = None) -> None:
        """Let every rank know whether any of them failed, so that all stop together and none hangs.

        Call it on every rank at the end of work that communicates nothing (loading, saving), with this
        rank's exception or None.

        Raises:
            BaseException: ``error`` itself, on the ranks that failed.
            RankFailedError: on the others, naming the first failing rank and its error.
        """
        failures = self.all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RankFailedError(f"rank {rank} of {self.size} failed: {failure}")

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run the body, which must not communicate, on every rank, and stop every rank if it failed on one.

        Raises:
            BaseException: the body's own, on the ranks where it failed.
            RankFailedError: on the others.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as failure:  # an interrupt too must not leave the other ranks waiting
            error = failure
        self.agree(error)

    def same_everywhere(self, **values: Any) -> None:
        """Refuse to go on where the ranks were given different values; every rank calls this, under the same names.

        Ranks that go on with different arguments meet in collectives that do not fit together: they hang, or mix
        what they compute. Only digests travel, so a value may be large.

        Args:
            values: what each name stands for on this rank; compared by ``repr``.

        Raises:
            ValueError: on every rank, naming the first value that differs, and the first rank that differs from
                rank 0 in it.
        """
        digests = {
            name: (hashlib.sha256(text.encode()).hexdigest(), _abridged(text))
            for name, text in ((name, repr(value)) for name, value in values.items())
        }
        mine, *others = self.all_gather_object(digests)
        for name in {name: None for theirs in (mine, *others) for name in theirs}:
            for rank, theirs in enumerate(others, 1):
                if mine.get(name) != theirs.get(name):
                    found = [given[name][1] if name in given else "nothing" for given in (mine, theirs)]
                    raise ValueError(
                        f"{name} differs between the ranks, rank 0 was given {found[0]} and rank {rank} {found[1]}: "
                        "give every rank the same"
                    )


def _unpickled(rank: int, size: int, device: torch.device, communicator: Communicator) -> TensorParallel:
    tp = TensorParallel(device=device, communicator=communicator)
    tp.rank, tp.size = rank, size
    return tp


def _abridged(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:60]} ... {text[-25:]}"


def checked(tp: TensorParallel | None) -> TensorParallel:
    """``tp`` itself, one rank for None.

    Raises:
        ValueError: something else was passed, such as a number of ranks.
    """
    if tp is None:
        return TensorParallel()
    if not isinstance(tp, TensorParallel):
        raise ValueError(
            f"got tp={tp!r}: pass a TensorParallel, such as TensorParallel.from_env() under torchrun"
        )
    return tp
