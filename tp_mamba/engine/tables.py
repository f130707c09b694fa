"""What the requests in the slots of an engine change in their logits before a token is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tp_mamba.batch import copy_to_device
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request


class SlotTables:
    """A row per slot and a column per id, each table made for the first request that needs it.

    Rows of requests that do not need a table may hold anything in those that a penalty scales, since theirs is
    neutral; in the table of what is added, they are zero.
    """

    def __init__(self, slots: int, start: int, width: int, device: torch.device) -> None:
        """For ids ``start`` up to ``start + width``, those of this rank's logits."""
        self._slots, self._start, self._width, self._device = slots, start, width, device
        self._seen: torch.Tensor | None = None  # [slots, W] bool: prompt and text hold the id
        self._made: torch.Tensor | None = None  # [slots, W] int32: how often the text holds it
        self._bias: torch.Tensor | None = None  # [slots, W] float32: what is added to its logit
        self._biased: set[int] = set()

    def begin(self, request: Request) -> None:
        """Prepare for ``request``, which has just got its slot."""
        params, slot = request.params, request.slot
        assert slot is not None
        if params.repetition_penalty != 1:
            if self._seen is None:
                self._seen = self._table(torch.bool)
            self._seen[slot].zero_().index_fill_(0, self._own(request.prompt), True)
        if counts_text(params):
            if self._made is None:
                self._made = self._table(torch.int32)
            self._made[slot].zero_()
        if adds(params):
            self._write_bias(request)
        elif slot in self._biased:
            assert self._bias is not None
            self._bias[slot].zero_()
            self._biased.remove(slot)

    def rows(self, requests: Sequence[Request], slots: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Those tables that any of ``requests``, in ``slots [B]`` on the device, needs: each ``[B, W]``, by its name
        in :func:`tp_mamba.engine.choice.adjust`. Rows whose text may end from here on are told so."""
        if slots is None:
            return {}
        found = {}
        params = [request.params for request in requests]
        if any(each.repetition_penalty != 1 for each in params):
            assert self._seen is not None  # begin() made it, and those below
            found["seen"] = self._seen[slots]
        if any(map(counts_text, params)):
            assert self._made is not None
            found["made"] = self._made[slots]
        if any(map(adds, params)):
            assert self._bias is not None
            for request in requests:
                if request.params.min_tokens and request.launched == request.params.min_tokens:
                    self._write_bias(request)
            found["bias"] = self._bias[slots]
        return found

    def see(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Note that the rows of ``slots [B]`` have made ``tokens [B]``, where those are in this rank's columns."""
        columns = tokens - self._start
        here = (columns >= 0) & (columns < self._width)
        columns = columns.clamp(0, self._width - 1)
        if self._seen is not None:
            self._seen[slots, columns] |= here
        if self._made is not None:
            self._made[slots, columns] += here

    def _write_bias(self, request: Request) -> None:
        """Its ``logit_bias``; and while the text may not end, -inf for the ids that would end it."""
        if self._bias is None:
            self._bias = self._table(torch.float32)
        params, slot = request.params, request.slot
        assert slot is not None
        row = self._bias[slot].zero_()
        self._biased.add(slot)
        if params.logit_bias:
            ids, values = (np.asarray(column) for column in zip(*params.bias_pairs, strict=True))
            columns = ids.astype(np.int64) - self._start
            own = (columns >= 0) & (columns < self._width)
            places, added = copy_to_device([columns[own], values[own].astype(np.float64)], self._device)
            row.index_copy_(0, places, added.float())
        if request.launched < params.min_tokens:
            row.index_fill_(0, self._own([*request.eos_ids, *params.stop_token_ids]), -torch.inf)

    def _own(self, ids: Sequence[int]) -> torch.Tensor:
        """Columns of those of ``ids`` that are this rank's."""
        columns = np.asarray(ids, dtype=np.int64) - self._start
        (own,) = copy_to_device([columns[(columns >= 0) & (columns < self._width)]], self._device)
        return own

    def _table(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self._slots, self._width, dtype=dtype, device=self._device)


def counts_text(params: SamplingParams) -> bool:
    """Whether a penalty depends on how often the text holds an id."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def adds(params: SamplingParams) -> bool:
    """Whether something is added to its logits, at least at first."""
    return bool(params.logit_bias) or params.min_tokens > 0
