"""The tensors that states live in, for layers of any mixture.

Layers with equal specs share one tensor per spec, so that setting a slot to zero, or copying it, is one operation for
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tp_mamba.layers.state_spec import StatefulLayer, StateSpec, state_type
from tp_mamba.parallel.sharding import Shard


@dataclass(frozen=True, slots=True)
class StackedState:
    """The states of one name in all layers that keep them alike."""

    name: str
    """The spec's own name, with the number of its first layer (``conv_state.7``) where several kinds have it."""
    spec: StateSpec
    layers: tuple[int, ...]
    """Positions of these layers in the model."""

    @property
    def shard(self) -> Shard:
        """How one sequence's ``[layers, *shape]`` is divided over the ranks."""
        return self.spec.stacked(len(self.layers))


def stack(layers: Sequence[StatefulLayer]) -> list[StackedState]:
    """What ``layers`` keep, layers with equal specs together.

    Raises:
        ValueError: something that declares no state, or two states of one layer with the same name.
    """
    kinds: dict[tuple[StateSpec, ...], list[int]] = {}
    for position, layer in enumerate(layers):
        if not isinstance(layer, StatefulLayer):
            raise ValueError(
                f"layer {position} is a {type(layer).__name__}, which declares no state: give layers with "
                "state_spec()"
            )
        specs = tuple(layer.state_spec())
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise ValueError(f"layer {position} keeps states {names}: give each a name of its own")
        kinds.setdefault(specs, []).append(position)
    all_names = [spec.name for specs in kinds for spec in specs]
    return [
        StackedState(
            spec.name if all_names.count(spec.name) == 1 else f"{spec.name}.{positions[0]}",
            spec,
            tuple(positions),
        )
        for specs, positions in kinds.items()
        for spec in specs
    ]


def bytes_per_slot(layers: Sequence[StatefulLayer]) -> int:
    """Bytes of one sequence's state on this rank, all ``layers``."""
    return sum(spec.local_bytes(layer.tp.size) for layer in layers for spec in layer.state_spec())


class StateStore:
    """The states of ``slots`` sequences in ``layers``, zero at first.

    Attributes:
        stacked: what each tensor holds, by its name.
        tensors: ``[layers of the kind, slots, *shape on this rank]``, by the same names.
        layer_states: each layer's own view ``[slots, ...]`` of them, of the type that the layer takes.
    """

    def __init__(self, layers: Sequence[StatefulLayer], slots: int, device: torch.device) -> None:
        """Allocate for ``layers``; see :func:`stack` for what is refused."""
        self.stacked = {each.name: each for each in stack(layers)}
        n = layers[0].tp.size
        self.tensors = {
            name: each.spec.allocate(len(each.layers), slots, n, device)
            for name, each in self.stacked.items()
        }
        views: list[list[torch.Tensor]] = [[] for _ in layers]
        for name, each in self.stacked.items():  # in the order of each layer's specs
            for row, position in enumerate(each.layers):
                views[position].append(self.tensors[name][row])
        self.layer_states: list[Any] = [
            state_type(layer)(*tensors) for layer, tensors in zip(layers, views, strict=True)
        ]

    def slot(self, slot: int) -> dict[str, torch.Tensor]:
        """Views of one sequence's states: ``[layers of the kind, *shape on this rank]``."""
        return {name: tensor[:, slot] for name, tensor in self.tensors.items()}

    def zero(self, slot: int) -> None:
        """Set ``slot`` to the state before the first token."""
        for tensor in self.tensors.values():
            tensor[:, slot].zero_()

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` the same sequence as ``source``."""
        for tensor in self.tensors.values():
            tensor[:, target].copy_(tensor[:, source])
