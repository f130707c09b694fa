"""The next tokens of requests that each have parameters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tp_mamba.batch import copy_to_device
from tp_mamba.engine.choice import RowParams, choose
from tp_mamba.engine.cut_vocabulary import CutVocabulary, choose_over_ranks
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request

_COLUMNS = {
    "temperature": np.float64,
    "top_k": np.int64,
    "top_p": np.float64,
    "min_p": np.float64,
    "repetition_penalty": np.float64,
}


class Sampler:
    """The next tokens of requests that each have parameters of their own.

    Keeps, for requests with a repetition penalty, which ids their prompts and texts hold.
    """

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
        self._slots, self._usable, self._device, self._cut = slots, usable, device, cut
        self._start, self._width = (0, vocab_size) if cut is None else (cut.start, cut.width)
        # [slots, V] bool, or this rank's columns of it; made for the first request with a penalty.
        self._seen: torch.Tensor | None = None

    def begin(self, request: Request) -> None:
        """Prepare for ``request``, which has just got its slot."""
        if request.params.repetition_penalty == 1:
            return
        if self._seen is None:
            self._seen = torch.zeros(self._slots, self._width, dtype=torch.bool, device=self._device)
        ids = np.asarray(request.prompt, dtype=np.int64) - self._start
        (prompt,) = copy_to_device([ids[(ids >= 0) & (ids < self._width)]], self._device)
        self._seen[request.slot].zero_().index_fill_(0, prompt, True)

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
        if any(each.repetition_penalty != 1 for each in distinct):
            arrays["slots"] = np.asarray([request.slot for request in requests], dtype=np.int64)
        for name, values in _differing(distinct).items():
            if draws or name == "repetition_penalty":
                arrays[name] = np.asarray(values, dtype=_COLUMNS[name])
        copies = copy_to_device(list(arrays.values()), self._device) if arrays else []
        on_device = dict(zip(arrays, copies, strict=True))
        uniforms, slots = on_device.pop("uniforms", None), on_device.pop("slots", None)
        seen = None
        if slots is not None:
            assert self._seen is not None  # begin() made it
            seen = self._seen[slots]
        row_params = _row_params(distinct, on_device)
        if self._cut is not None:
            tokens = choose_over_ranks(logits, row_params, self._cut, seen=seen, uniforms=uniforms)
        else:
            seen = None if seen is None else seen[:, : self._usable]
            tokens = choose(logits[:, : self._usable], row_params, seen=seen, uniforms=uniforms)
        if slots is not None:
            self._see(slots, tokens)
        return tokens

    def _see(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Note that the rows of ``slots`` have made ``tokens``, those of them that are in this rank's columns."""
        assert self._seen is not None
        columns = tokens - self._start
        here = (columns >= 0) & (columns < self._width)
        columns = columns.clamp(0, self._width - 1)
        self._seen[slots, columns] |= here


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
