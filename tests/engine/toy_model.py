"""A small recurrent model with the interface generation uses, and everything that misuse would spoil.

Its logits depend on every token before, through the cache's slots alone; free slots hold NaN.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace

import torch

from tp_mamba.batch import MambaMetadata
from tp_mamba.parallel.group import TensorParallel


def prompts_of(lengths: list[int], seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(40) for _ in range(length)] for length in lengths]


class ToyCache:
    def __init__(self, slots: int, width: int) -> None:
        self.states = torch.full((slots, width), torch.nan, dtype=torch.float64)
        self.used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self.states) - len(self.used)

    def allocate(self) -> int:
        slot = next(slot for slot in range(len(self.states)) if slot not in self.used)
        self.used.add(slot)
        return slot

    def free(self, slot: int) -> None:
        self.used.remove(slot)
        self.states[slot] = torch.nan

    def copy(self, source: int, target: int) -> None:
        assert {source, target} <= self.used
        self.states[target] = self.states[source]


class ToyModel:
    """Serves as a :class:`tp_mamba.engine.model.Model`, with what tests look at beside it."""

    device = torch.device("cpu")
    bytes_per_slot = 8 * 8
    activation_bytes_per_token = 100

    def __init__(
        self,
        vocab_size: int = 40,
        usable: int | None = None,
        eos: tuple[int, ...] = (),
        seed: int = 0,
        tp: TensorParallel | None = None,
    ):
        self.tp = tp or TensorParallel(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(
            vocab_size=vocab_size, usable_vocab_size=usable, eos_token_ids=eos, pad_token_id=None
        )
        width = 8
        self.mix = torch.randn(width, width, dtype=torch.float64, generator=generator) / width**0.5
        self.embed = torch.randn(vocab_size, width, dtype=torch.float64, generator=generator)
        self.head = 3 * torch.randn(vocab_size, width, dtype=torch.float64, generator=generator)
        self.spoils: Callable[[int, int], bool] | None = None
        """Whether, in this pass (from 1), the logits of this slot are NaN."""
        self.caches: list[ToyCache] = []
        self.passes: list[MambaMetadata] = []
        self.most_rows = 0

    def new_cache(self, slots: int) -> ToyCache:
        self.caches.append(ToyCache(slots, len(self.mix)))
        return self.caches[-1]

    def advance(self, state: torch.Tensor, token: int) -> torch.Tensor:
        return torch.tanh(self.mix @ state + self.embed[token])

    def forward_packed(
        self, input_ids: torch.Tensor, metadata: MambaMetadata, cache: ToyCache, logits_indices: torch.Tensor
    ) -> torch.Tensor:
        return self.logits(self.forward_hidden(input_ids, metadata, cache), logits_indices)

    def forward_hidden(
        self, input_ids: torch.Tensor, metadata: MambaMetadata, cache: ToyCache
    ) -> torch.Tensor:
        self.passes.append(metadata)
        assert all(0 <= token < self.config.vocab_size for token in input_ids.tolist())
        starts, hidden = metadata.query_start_loc.tolist(), []
        for row, slot in enumerate(metadata.state_indices.tolist()):
            assert slot in cache.used
            state = (
                cache.states[slot]
                if metadata.has_initial_states[row]
                else torch.zeros(len(self.mix)).double()
            )
            for token in input_ids[starts[row] : starts[row + 1]].tolist():
                state = self.advance(state, token)
                hidden.append(state)
            cache.states[slot] = state
            if self.spoils is not None and self.spoils(len(self.passes), slot):
                hidden[-1] = torch.full_like(state, torch.nan)
        return torch.stack(hidden)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.most_rows = max(self.most_rows, len(rows))
        found = [self.head @ hidden[i] for i in rows.tolist()]
        return torch.stack(found).float() if found else torch.empty(0, self.config.vocab_size)

    def whole(self, ids: list[int]) -> torch.Tensor:
        """Logits after ``ids``, without a cache."""
        state = torch.zeros(len(self.mix), dtype=torch.float64)
        for token in ids:
            state = self.advance(state, token)
        return (self.head @ state).float()
