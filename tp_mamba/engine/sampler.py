"""The next tokens of requests that each have parameters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tp_mamba.batch import copy_to_device
from tp_mamba.engine.choice import RowParams, choose
from tp_mamba.engine.cut_vocabulary import CutVocabulary, choose_over_ranks
from tp_mamba.engine.logprobs import score_rows
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.tables import SlotTables, adds, counts_text

_COLUMNS = {
    "temperature": np.float64,
    "top_k": np.int64,
    "top_p": np.float64,
    "min_p": np.float64,
    "repetition_penalty": np.float64,
    "presence_penalty": np.float64,
    "frequency_penalty": np.float64,
}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Sampler:
    """The next tokens of requests that each have parameters of their own."""

    def __init__(
        self,
        slots: int,
        vocab_size: int,
        usable: int,
        device: torch.device,
        *,
        cut: CutVocabulary | None = None,
    ) -> None:
        """For requests in ``slots`` slots. Of ``vocab_size`` ids only those below ``usable`` are ever made.

        Args:
            cut: which columns of the logits this rank has; None if all.
        """
        self._usable, self._device, self._cut = usable, device, cut
        start, width = (0, vocab_size) if cut is None else (cut.start, cut.width)
        self._tables = SlotTables(slots, start, width, device)

    def begin(self, request: Request) -> None:
        """Prepare for ``request``, which has just got its slot."""
        self._tables.begin(request)

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """The next token of each of ``requests``, from its row of ``logits [B, V]`` (``[B, W]`` where they are
        cut): ``[B]`` int64 on the device, :data:`NOT_FINITE` where there is none. Nothing waits for it.

        Random numbers are drawn for the requests that need them, so a greedy neighbour changes nobody's.
        """
        params = [request.params for request in requests]
        # Mostly they are one object, which list.count tells at the speed of C.
        distinct = params[:1] if params.count(params[0]) == len(params) else params
        draws = any(each.temperature for each in distinct)
        arrays: dict[str, np.ndarray] = {}
        if draws:
            drawn = [request.uniforms.next() if request.params.temperature else 0.0 for request in requests]
            arrays["uniforms"] = np.asarray(drawn, dtype=np.float64)
        if any(each.repetition_penalty != 1 or counts_text(each) or adds(each) for each in distinct):
            arrays["slots"] = np.asarray([request.slot for request in requests], dtype=np.int64)
        for name, values in _differing(distinct).items():
            if draws or name in _PENALTIES:
                arrays[name] = np.asarray(values, dtype=_COLUMNS[name])
        copies = copy_to_device(list(arrays.values()), self._device) if arrays else []
        on_device = dict(zip(arrays, copies, strict=True))
        uniforms, slots = on_device.pop("uniforms", None), on_device.pop("slots", None)
        tables = self._tables.rows(requests, slots)
        row_params = _row_params(distinct, on_device)
        if self._cut is not None:
            tokens = choose_over_ranks(logits, row_params, self._cut, **tables, uniforms=uniforms)
        else:
            tables = {name: table[:, : self._usable] for name, table in tables.items()}
            tokens = choose(logits[:, : self._usable], row_params, **tables, uniforms=uniforms)
        if slots is not None:
            self._tables.see(slots, tokens)
        return tokens

    def score(
        self, logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[Request]
    ) -> torch.Tensor | None:
        """The scores of ``tokens [B]``, which :meth:`sample` has chosen from ``logits``, for those of ``requests`` that
        ask for them, in their order: as :func:`score_rows` gives them. None if none does."""
        rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        if not rows:
            return None
        if len(rows) < len(requests):
            (places,) = copy_to_device([np.asarray(rows, dtype=np.int64)], self._device)
            logits, tokens = logits[places], tokens[places]
        top = max(requests[row].params.logprobs or 0 for row in rows)
        return score_rows(logits, tokens, top, usable=self._usable, cut=self._cut)


def _differing(params: Sequence[SamplingParams]) -> dict[str, list[float]]:
    """The values, row by row, of the parameters in which the rows differ."""
    if len(params) == 1:
        return {}
    columns = {name: [getattr(each, name) for each in params] for name in _COLUMNS}
    return {name: column for name, column in columns.items() if column.count(column[0]) != len(column)}


def _row_params(
    params: Sequence[SamplingParams], columns: dict[str, torch.Tensor]
) -> SamplingParams | RowParams:
    """What :func:`choose` needs for ``params``, given the ``columns [B]`` in which they differ."""
    if not columns:
        return params[0]
    values: dict[str, Any] = {
        name: columns[name][:, None] if name in columns else getattr(params[0], name) for name in _COLUMNS
    }
    greedy = None
    if "temperature" in columns:
        greedy = columns["temperature"] == 0
        values["temperature"] = values["temperature"].masked_fill(greedy[:, None], 1.0)
    return RowParams(**values, greedy=greedy, largest_k=max(each.top_k for each in params))
