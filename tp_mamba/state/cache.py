"""Recurrent state of many sequences: slots that are allocated, shared, copied, saved, and moved between rank counts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tp_mamba.layers.state_spec import StatefulLayer
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.state.files import read_state, write_state
from tp_mamba.state.slots import SlotPool
from tp_mamba.state.store import StateStore, bytes_per_slot


class MambaCache:
    """The states of ``slots`` sequences in every layer of a model: a store, its slots, and their files.

    A slot is the whole memory of one sequence; its size does not depend on how many tokens were seen. Slot
    numbers are the same on every rank as long as every rank allocates and frees in the same order.

    Attributes:
        tp: the ranks that each state is divided over.
        slots: how many there are.
        device: where they are.
        bytes_per_slot: bytes of one sequence's state on this rank, all layers.
    """

    def __init__(
        self,
        layers: Sequence[StatefulLayer],
        slots: int,
        *,
        model: str = "",
        device: torch.device | None = None,
    ) -> None:
        """Room for ``slots`` sequences in ``layers``, zero at first.

        Args:
            layers: those of one model, in order; their states may differ in names, shapes and dtypes.
            model: what saved states are said to belong to, beside the shapes of their tensors.
            device: by default that of the first parameter among ``layers``.

        Raises:
            ValueError: no slots, no layers, or a layer without ``state_spec()``.
        """
        if slots < 1 or not layers:
            raise ValueError(
                f"got {slots} slots for {len(layers)} layers: a cache needs at least one of each"
            )
        self.slots, self.device = slots, device or _device_of(layers)
        self._model = model
        self._store = StateStore(layers, slots, self.device)
        self.tp: TensorParallel = layers[0].tp
        self._pool = SlotPool(slots)
        self.bytes_per_slot = bytes_per_slot(layers)

    @property
    def num_layers(self) -> int:
        """Layers that it was made for."""
        return len(self._store.layer_states)

    def layer(self, index: int) -> Any:
        """The slots of layer ``index`` as that layer takes them: for a mixer a :class:`MambaState`."""
        return self._store.layer_states[index]

    @property
    def conv_states(self) -> torch.Tensor:
        """``[layers, slots, D/n, K-1]``, in the model's dtype by default; for layers that are all alike."""
        return self._of_all_layers("conv_state")

    @property
    def ssm_states(self) -> torch.Tensor:
        """``[layers, slots, D/n, N]``, float32 by default; for layers that are all alike."""
        return self._of_all_layers("ssm_state")

    def _of_all_layers(self, name: str) -> torch.Tensor:
        if name not in self._store.tensors:
            raise ValueError(
                f"there is no one {name} for all layers, the states are {', '.join(self._store.tensors)}: take each "
                "layer's own with layer(index)"
            )
        return self._store.tensors[name]

    @property
    def num_free(self) -> int:
        """Slots that :meth:`allocate` can still hand out."""
        return self._pool.num_free

    def allocate(self) -> int:
        """Take the lowest free slot and set its state to zero, the state before the first token.

        Raises:
            ValueError: none is free.
        """
        slot = self._pool.acquire()
        self._store.zero(slot)
        return slot

    def share(self, slot: int) -> None:
        """Hold ``slot`` once more, so that it stays until :meth:`free` was called once more too.

        For sequences that begin alike. None of its holders may advance it: each takes :meth:`own` first.

        Raises:
            ValueError: it is not in use.
        """
        self._pool.share(slot)

    def own(self, slot: int) -> int:
        """A slot with the state of ``slot`` that its caller, one of the holders of ``slot``, may advance.

        Returns:
            ``slot`` itself if nobody else holds it, else a copy, and one holder of ``slot`` less.

        Raises:
            ValueError: it is not in use, or no slot is free for the copy.
        """
        self._pool.check_used(slot)
        if self._pool.holders(slot) == 1:
            return slot
        mine = self._pool.acquire()
        self._store.copy(slot, mine)
        self._pool.release(slot)
        return mine

    def free(self, slot: int) -> None:
        """Give ``slot`` back; others that share it keep it.

        Raises:
            ValueError: it is not in use.
        """
        self._pool.release(slot)

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` the same sequence as ``source`` (to branch a prompt); both must be in use.

        Raises:
            ValueError: either is not in use.
        """
        self._pool.check_used(source)
        self._pool.check_used(target)
        self._store.copy(source, target)

    def save(self, path: str | os.PathLike[str], slot: int) -> None:
        """Write ``slot`` to one safetensors file that any rank count can :meth:`load`; every rank calls this.

        The file holds ``conv_state [layers, D, K-1]`` and ``ssm_state [layers, D, N]``, whole, and names the model.
        Rank 0 writes it beside ``path``, flushes it to the disk and renames it, so a failure or a power cut leaves an
        older file as it was.

        Raises:
            ValueError: ``slot`` is not in use, or ``path`` is a folder.
            OSError: the file cannot be written.
            RankFailedError: rank 0 could not write it.
        """
        self._pool.check_used(slot)
        tensors = {name: self._gather(name, local) for name, local in self._store.slot(slot).items()}
        with self.tp.agreed():
            if self.tp.rank == 0:
                write_state(Path(path), self._model, self._store.stacked, tensors)

    def load(self, path: str | os.PathLike[str], slot: int) -> None:
        """Fill ``slot`` with this rank's part of a saved state; every rank calls this.

        Raises:
            ValueError: ``slot`` is not in use, or the file is missing, corrupt, of another model, or of a wider
                dtype than this cache.
            RankFailedError: another rank could not read it.
        """
        self._pool.check_used(slot)
        with self.tp.agreed():  # nothing is changed anywhere unless every rank could read its part
            loaded = read_state(Path(path), self._model, self._store.stacked, self.tp)
        for name, local in self._store.slot(slot).items():
            local.copy_(loaded[name])

    def _gather(self, name: str, local: torch.Tensor) -> torch.Tensor:
        shard = self._store.stacked[name].shard
        if shard.dim is None:
            return local.cpu().contiguous()
        gathered = self.tp.all_gather(local.contiguous(), dim=shard.dim)
        return shard.merge(gathered.chunk(self.tp.size, dim=shard.dim)).cpu().contiguous()


def _device_of(layers: Sequence[StatefulLayer]) -> torch.device:
    for layer in layers:
        for parameter in getattr(layer, "parameters", list)():
            return parameter.device
    return layers[0].tp.device
