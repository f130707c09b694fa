"""Continuous batching: which sequences advance in the next forward pass, and by how much."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from tp_mamba.batch import MambaMetadataBuilder, copy_to_device
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import ActiveSequence, TokenEvent
from tp_mamba.engine.sampler import NOT_FINITE, choose


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The next ``length`` prompt tokens of a sequence."""

    sequence: ActiveSequence
    length: int


class Engine:
    """Advances sequences together, one packed forward pass a step, on a state cache of its own.

    Every sequence whose prompt is in decodes one token in every step; in the same pass, prompts are taken in,
    in order, up to a fixed number of tokens, a longer prompt in several steps. Memory is therefore bounded by
    the slots and that number, whatever the prompts' lengths. A sequence that ends gives its slot to the next
    that waits.

    Decisions rest on host values that are the same on every rank, so the ranks never need to talk about them.
    """

    def __init__(
        self,
        model: Any,
        sequences: Iterable[ActiveSequence],
        params: SamplingParams,
        *,
        slots: int,
        max_prefill_tokens: int,
        usable: int,
    ) -> None:
        """Prepare to run ``sequences`` in this order, at most ``slots`` at a time, with the same ``params``.

        Of the vocabulary, only ids below ``usable`` are ever made.
        """
        self._model, self._params, self._max_prefill_tokens = model, params, max_prefill_tokens
        self._waiting = deque(sequences)
        self._running: list[ActiveSequence] = []
        self._cache = model.new_cache(slots)
        self._builder = MambaMetadataBuilder(model.device)
        self._usable = usable
        # Which ids each slot's prompt and text hold, for the repetition penalty alone.
        self._seen = (
            torch.zeros(slots, model.config.vocab_size, dtype=torch.bool, device=model.device)
            if params.repetition_penalty != 1
            else None
        )

    @property
    def busy(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self._running or self._waiting)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One forward pass; an event for each sequence that made a token in it.

        Raises:
            RuntimeError: a sequence's logits are not finite.
        """
        decoding = [sequence for sequence in self._running if not sequence.remaining]
        chunks = self._schedule_prefill()
        # A chunk that is the last of its prompt gives that sequence's first token.
        sampling = decoding + [chunk.sequence for chunk in chunks if chunk.length == chunk.sequence.remaining]

        logits = self._forward(decoding, chunks)
        for chunk in chunks:
            chunk.sequence.taken += chunk.length
        if not sampling:  # a long prompt is still on its way in
            return []
        events = []
        for sequence, token in zip(sampling, self._sample(logits, sampling), strict=True):
            if token == NOT_FINITE:
                raise RuntimeError(
                    f"prompt {sequence.index}: the logits of new token {len(sequence.token_ids)} are not "
                    "finite, so the weights are damaged or their dtype is too narrow: try float32"
                )
            events.append(sequence.accept(token))
            if events[-1].finish_reason is not None:
                self._release(sequence)
        return events

    def close(self) -> None:
        """Give back every slot, whether or not its sequence has ended; there is no step after this."""
        for sequence in list(self._running):
            self._release(sequence)
        self._waiting.clear()

    def _release(self, sequence: ActiveSequence) -> None:
        self._running.remove(sequence)
        self._cache.free(sequence.slot)

    def _schedule_prefill(self) -> list[_Chunk]:
        """What this step takes in: prompts already begun, then, while slots are free, those that wait."""
        budget, chunks = self._max_prefill_tokens, []
        for sequence in self._running:
            if sequence.remaining and budget:
                chunks.append(_Chunk(sequence, min(sequence.remaining, budget)))
                budget -= chunks[-1].length
        while self._waiting and budget and self._cache.num_free:
            sequence = self._admit(self._waiting.popleft())
            chunks.append(_Chunk(sequence, min(sequence.remaining, budget)))
            budget -= chunks[-1].length
        return chunks

    def _admit(self, sequence: ActiveSequence) -> ActiveSequence:
        sequence.slot = self._cache.allocate()
        self._running.append(sequence)
        if self._seen is not None:
            (prompt,) = copy_to_device([np.asarray(sequence.prompt, dtype=np.int64)], self._model.device)
            self._seen[sequence.slot].zero_().index_fill_(0, prompt, True)
        return sequence

    def _forward(self, decoding: list[ActiveSequence], chunks: list[_Chunk]) -> torch.Tensor:
        """Logits ``[B, V]`` of the rows that sample: the decode rows, then the ends of completed prompts."""
        pieces = [c.sequence.prompt[c.sequence.taken : c.sequence.taken + c.length] for c in chunks]
        token_ids = [*(sequence.token_ids[-1] for sequence in decoding), *chain.from_iterable(pieces)]
        ends = len(decoding) + np.cumsum([chunk.length for chunk in chunks], dtype=np.int64) - 1
        last_of_prompt = [chunk.length == chunk.sequence.remaining for chunk in chunks]
        wanted = [*range(len(decoding)), *ends[np.asarray(last_of_prompt, dtype=np.bool_)]]
        metadata = self._builder.build(
            decode_slots=[sequence.slot for sequence in decoding],
            prefill_slots=[chunk.sequence.slot for chunk in chunks],
            prefill_lengths=[chunk.length for chunk in chunks],
            has_initial_states=[chunk.sequence.taken > 0 for chunk in chunks],
        )
        input_ids, logits_indices = copy_to_device(
            [np.asarray(token_ids, dtype=np.int64), np.asarray(wanted, dtype=np.int64)], self._model.device
        )
        return self._model.forward_packed(input_ids, metadata, self._cache, logits_indices=logits_indices)

    def _sample(self, logits: torch.Tensor, sampling: list[ActiveSequence]) -> list[int]:
        """The next token of each row of ``logits [B, V]``; only here a step waits for the device."""
        uniforms = seen = slots = None
        if self._params.temperature > 0:
            drawn = np.asarray([sequence.uniforms.next() for sequence in sampling], dtype=np.float64)
            (uniforms,) = copy_to_device([drawn], self._model.device)
        if self._seen is not None:
            indices = np.asarray([sequence.slot for sequence in sampling], dtype=np.int64)
            (slots,) = copy_to_device([indices], self._model.device)
            seen = self._seen[slots, : self._usable]
        tokens = choose(logits[:, : self._usable], self._params, seen=seen, uniforms=uniforms)
        if self._seen is not None and slots is not None:
            self._seen[slots, tokens] = True
        return tokens.tolist()
