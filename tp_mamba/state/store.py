"""Recurrent state of many sequences: slots that are allocated, copied, saved, and moved between rank counts."""

from __future__ import annotations

import heapq
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tp_mamba.mixer import MambaMixer, MambaState
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import Shard

_FORMAT = "tp-mamba state 1"


class MambaCache:
    """The states of ``slots`` sequences in every layer of a model.

    A slot is the whole memory of one sequence; its size does not depend on how many tokens were seen. Slot
    numbers are the same on every rank as long as every rank allocates and frees in the same order.

    Attributes:
        conv_states: ``[layers, slots, D/n, K-1]``, in the model's dtype by default.
        ssm_states: ``[layers, slots, D/n, N]``, float32 by default.
        slots: how many there are.
    """

    def __init__(self, mixers: list[MambaMixer], slots: int) -> None:
        """Room for ``slots`` sequences in ``mixers``, one a layer and all alike, zero at first.

        Raises:
            ValueError: no slots, or no mixers.
        """
        if slots < 1 or not mixers:
            raise ValueError(
                f"got {slots} slots for {len(mixers)} layers: a cache needs at least one of each"
            )
        first = mixers[0]
        (D, window), (_, N) = first.get_state_shape()
        conv_dtype, ssm_dtype = first.get_state_dtype()
        self.tp: TensorParallel = first.tp
        self.slots, self.device = slots, first.A.device
        layers = len(mixers)
        # Stored with the channels contiguous, which is how the kernels read and write them.
        self.conv_states = torch.zeros(layers, slots, window, D, dtype=conv_dtype, device=self.device).mT
        self.ssm_states = torch.zeros(layers, slots, N, D, dtype=ssm_dtype, device=self.device).mT
        self._shards = {
            "conv_state": Shard(shape=(layers, first.intermediate_size, window), dim=1),
            "ssm_state": Shard(shape=(layers, first.intermediate_size, N), dim=1),
        }
        self._free = list(range(slots))  # a heap: the lowest free number is handed out first
        self._used: set[int] = set()

    def layer(self, index: int) -> MambaState:
        """The slots of layer ``index``, for :meth:`MambaMixer.forward`."""
        return MambaState(self.conv_states[index], self.ssm_states[index])

    @property
    def num_layers(self) -> int:
        """How many layers it keeps states of."""
        return int(self.conv_states.shape[0])

    @property
    def num_free(self) -> int:
        """Slots that :meth:`allocate` can still hand out."""
        return len(self._free)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one sequence's state on this rank, all layers."""
        return sum(t[:, 0].numel() * t.element_size() for t in (self.conv_states, self.ssm_states))

    def allocate(self) -> int:
        """Take the lowest free slot and set its state to zero, the state before the first token.

        Raises:
            ValueError: none is free.
        """
        if not self._free:
            raise ValueError(
                f"no free slot: all {self.slots} are in use, so free one first or make a cache with more slots"
            )
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        self.conv_states[:, slot].zero_()
        self.ssm_states[:, slot].zero_()
        return slot

    def free(self, slot: int) -> None:
        """Give ``slot`` back.

        Raises:
            ValueError: it is not in use.
        """
        self._check_used(slot)
        self._used.remove(slot)
        heapq.heappush(self._free, slot)

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` the same sequence as ``source`` (to branch a prompt); both must be in use.

        Raises:
            ValueError: either is not in use.
        """
        self._check_used(source)
        self._check_used(target)
        self.conv_states[:, target].copy_(self.conv_states[:, source])
        self.ssm_states[:, target].copy_(self.ssm_states[:, source])

    def save(self, path: str | os.PathLike[str], slot: int) -> None:
        """Write ``slot`` to one safetensors file that any rank count can :meth:`load`; every rank calls this.

        The file holds ``conv_state [layers, D, K-1]`` and ``ssm_state [layers, D, N]``, whole. Rank 0 writes it
        beside ``path`` and renames it, so a failure leaves an older file as it was.

        Raises:
            ValueError: ``slot`` is not in use, or ``path`` is a folder.
            OSError: the file cannot be written.
            RankFailedError: rank 0 could not write it.
        """
        self._check_used(slot)
        tensors = {name: self._gather(name, local) for name, local in self._local(slot).items()}
        with self.tp.agreed():
            if self.tp.rank == 0:
                _write(Path(path), tensors)

    def load(self, path: str | os.PathLike[str], slot: int) -> None:
        """Fill ``slot`` with this rank's part of a saved state; every rank calls this.

        Raises:
            ValueError: ``slot`` is not in use, or the file is missing, corrupt, of another model, or of a wider
                dtype than this cache.
            RankFailedError: another rank could not read it.
        """
        self._check_used(slot)
        with self.tp.agreed():  # nothing is changed anywhere unless every rank could read its part
            pieces = self._read(Path(path))
        for name, local in self._local(slot).items():
            local.copy_(pieces[name])

    def _local(self, slot: int) -> dict[str, torch.Tensor]:
        """Views of one slot: ``[layers, D/n, K-1]`` and ``[layers, D/n, N]``."""
        return {"conv_state": self.conv_states[:, slot], "ssm_state": self.ssm_states[:, slot]}

    def _gather(self, name: str, local: torch.Tensor) -> torch.Tensor:
        gathered = self.tp.all_gather(local.contiguous(), dim=1)
        return self._shards[name].merge(gathered.chunk(self.tp.size, dim=1)).cpu().contiguous()

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(
                        f"{path} is not a state saved by MambaCache.save: pass a file that it wrote"
                    )
                return {name: self._read_one(file, path, name) for name in self._shards}
        except (OSError, SafetensorError) as failure:
            raise ValueError(
                f"the state file {path} cannot be read ({failure}): it is missing or damaged, save it again"
            ) from failure

    def _read_one(self, file: safe_open, path: Path, name: str) -> torch.Tensor:
        shard, held = self._shards[name], self.conv_states if name == "conv_state" else self.ssm_states
        if name not in file.keys() or tuple(file.get_slice(name).get_shape()) != shard.shape:  # noqa: SIM118
            found = file.get_slice(name).get_shape() if name in file.keys() else "nothing"  # noqa: SIM118
            raise ValueError(
                f"{path}: {name} holds {found}, this model's state is {list(shard.shape)}: load one of the same model"
            )
        spans = shard.spans(self.tp.rank, self.tp.size)
        view = file.get_slice(name)
        local = shard.assemble([view[:, s.start : s.stop] for s in spans], self.tp.rank, self.tp.size)
        if not local.dtype.is_floating_point or torch.promote_types(local.dtype, held.dtype) != held.dtype:
            raise ValueError(
                f"{path}: {name} is {local.dtype}, this cache keeps {held.dtype}, which would lose precision: make the "
                "cache in the wider dtype"
            )
        return local

    def _check_used(self, slot: int) -> None:
        if slot not in self._used:
            raise ValueError(
                f"slot {slot} is not in use (slots in use: {sorted(self._used)}): pass one that allocate() returned"
            )


def _write(target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write beside ``target`` and rename, so that a failure leaves an older file as it was."""
    if target.is_dir() or not target.name:
        raise ValueError(f"the state cannot be saved as {str(target)!r}: give the name of a file")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": _FORMAT})
        os.replace(partial, target)
    except (OSError, SafetensorError) as failure:
        # safetensors reports a full disk as its own error: it is one of the file system's all the same.
        raise OSError(
            f"the state could not be written to {target}: {failure}; free some space or choose another path"
        ) from failure
    finally:
        partial.unlink(missing_ok=True)
