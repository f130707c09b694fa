"""What generation asks of a model, and nothing more: any model with these serves."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tp_mamba.batch import MambaMetadata
from tp_mamba.engine.scheduler import Slots
from tp_mamba.parallel.group import TensorParallel

Cache = Slots
"""What generation asks of a state cache: slots. What lies in them is between the cache and its model."""


class ModelConfig(Protocol):
    """The vocabulary of a model."""

    @property
    def vocab_size(self) -> int:
        """``V``: the width of the logits."""

    @property
    def usable_vocab_size(self) -> int | None:
        """Ids at or above it are never made; None: all may be."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""

    @property
    def pad_token_id(self) -> int | None:
        """The id with which shorter rows of a tensor of prompts are filled up; None: perhaps the ends of text."""


def cuts_logits(model: Model) -> bool:
    """Whether ``model`` gives each of several ranks its own columns of the logits, if asked.

    It then says so by an attribute ``gives_cut_logits``, and its ``forward_packed`` takes ``whole_vocab=False``: the
    result is ``[len(logits_indices), W]``, the columns of this rank, ``W`` the vocabulary over the ranks, rounded up.
    """
    return model.tp.size > 1 and getattr(model, "gives_cut_logits", False)


def gives_hidden_states(model: Model) -> bool:
    """Whether prompts can be scored: then ``model`` has two methods more.

    ``forward_hidden(input_ids, metadata, cache)`` is its ``forward_packed`` up to the head: ``[T, H]``, the same on
    every rank. ``logits(hidden, rows, whole_vocab=True)`` are those that ``forward_packed`` gives of its ``rows``.
    """
    return hasattr(model, "forward_hidden") and hasattr(model, "logits")


class Model(Protocol):
    """A language model over the ranks of ``tp``, which continues sequences that a cache remembers."""

    @property
    def config(self) -> ModelConfig:
        """Its vocabulary."""

    @property
    def tp(self) -> TensorParallel:
        """The ranks, all of which generate together."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one sequence's state on this rank."""

    @property
    def activation_bytes_per_token(self) -> int:
        """Bytes that the activations of one packed token take on this rank at their peak, logits not counted."""

    def new_cache(self, slots: int) -> Any:
        """State for ``slots`` sequences, see :data:`Cache`; communicates nothing."""

    def forward_packed(
        self, input_ids: torch.Tensor, metadata: MambaMetadata, cache: Any, logits_indices: torch.Tensor
    ) -> torch.Tensor:
        """Advance the slots that ``metadata`` names by the packed tokens ``input_ids [T]``.

        Returns:
            float32 ``[len(logits_indices), V]``: the logits of those tokens, the same bits on every rank.
        """
