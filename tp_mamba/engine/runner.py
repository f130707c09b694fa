"""From a schedule to one forward pass."""

from __future__ import annotations

import numpy as np
import torch

from tp_mamba.batch import MambaMetadataBuilder, copy_to_device
from tp_mamba.engine.model import Cache, Model
from tp_mamba.engine.scheduler import Schedule


class Runner:
    """Runs scheduled passes of one model on one state cache; nothing here waits for the device."""

    def __init__(self, model: Model, cache: Cache) -> None:
        self._model, self._cache, self._device = model, cache, model.device
        self._builder = MambaMetadataBuilder(self._device)

    def forward(self, schedule: Schedule) -> torch.Tensor:
        """Run one pass and count its prompt tokens as taken.

        Returns:
            float32 logits ``[B, V]``, one row for each of ``schedule.sampling``.
        """
        decodes, chunks = schedule.decodes, schedule.chunks
        token_ids, wanted = [request.token_ids[-1] for request in decodes], list(range(len(decodes)))
        for chunk in chunks:
            token_ids += chunk.request.prompt[chunk.start : chunk.start + chunk.length]
            if chunk.completes:
                wanted.append(len(token_ids) - 1)
        metadata = self._builder.build(
            decode_slots=[request.slot for request in decodes],  # type: ignore[misc]
            prefill_slots=[chunk.request.slot for chunk in chunks],  # type: ignore[misc]
            prefill_lengths=[chunk.length for chunk in chunks],
            has_initial_states=[chunk.start > 0 for chunk in chunks],
        )
        input_ids, logits_indices = copy_to_device(
            [np.asarray(token_ids, dtype=np.int64), np.asarray(wanted, dtype=np.int64)], self._device
        )
        logits = self._model.forward_packed(input_ids, metadata, self._cache, logits_indices=logits_indices)
        for chunk in chunks:
            chunk.request.taken += chunk.length
        return logits
