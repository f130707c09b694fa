"""Scores of the tokens of prompts, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tp_mamba.batch import copy_to_device
from tp_mamba.engine.buffers import to_host
from tp_mamba.engine.cut_vocabulary import CutVocabulary
from tp_mamba.engine.logprobs import score_rows
from tp_mamba.engine.model import Model, cuts_logits
from tp_mamba.engine.request import Request
from tp_mamba.engine.scheduler import Schedule
from tp_mamba.engine.token_logprob import TokenLogprob, described

ROWS = 128
"""Tokens whose logits are in memory at a time, whatever the prompts' lengths."""


@dataclass(slots=True)
class Asked:
    """What of one pass is asked about."""

    parts: list[tuple[Request, range]] = field(default_factory=list)
    """Requests, each with the indices of those of its prompt's tokens that the pass can score."""
    rows: list[int] = field(default_factory=list)
    """Of each of those tokens: the row of the pass whose logits are about it, that of the token before."""

    @classmethod
    def of(cls, schedule: Schedule) -> Asked:
        """What is asked about in ``schedule``."""
        asked, first = cls(), len(schedule.decodes)
        for chunk in schedule.chunks:
            about = chunk.request.asked_about
            low = max(about.start, chunk.start + 1)
            part = range(low, max(low, min(about.stop, chunk.start + chunk.length + 1)))
            if part:
                asked.parts.append((chunk.request, part))
                asked.rows.extend(first + token - 1 - chunk.start for token in part)
            first += chunk.length
        return asked


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores that were asked for, and may still be on their way."""

    parts: list[tuple[Request, range]]
    receive: Callable[[], list[list[float]]]

    def hand_out(self) -> None:
        """Wait for them, and give them to their requests."""
        rows = iter(self.receive())
        for request, part in self.parts:
            request.scored.extend(_described(request, part, rows))


class PromptScorer:
    """Scores prompts with the head of one model.

    Where the model can, each rank keeps its own columns of the logits, and only sums and candidates travel.
    """

    def __init__(self, model: Model, usable: int) -> None:
        """Ids at or above ``usable`` are not listed among the likeliest."""
        self._model: Any = model
        self._usable, self._cut = usable, None
        if cuts_logits(model):
            self._cut = CutVocabulary.of(model.tp, model.config.vocab_size, usable)
        self._options = {} if self._cut is None else {"whole_vocab": False}

    def __call__(self, hidden: torch.Tensor, asked: Asked) -> PromptScores:
        """Launch the scores of what is ``asked`` about, from the ``hidden`` states ``[T, H]`` of its pass."""
        tokens = [request.prompt[token] for request, part in asked.parts for token in part]
        top = max(request.params.prompt_logprobs or 0 for request, _ in asked.parts)
        arrays = [np.asarray(each, dtype=np.int64) for each in (asked.rows, tokens)]
        rows, targets = copy_to_device(arrays, hidden.device)
        scores = [
            score_rows(
                self._model.logits(hidden, rows[at : at + ROWS], **self._options),
                targets[at : at + ROWS],
                top,
                usable=self._usable,
                cut=self._cut,
            )
            for at in range(0, len(tokens), ROWS)
        ]
        return PromptScores(asked.parts, to_host(torch.cat(scores)))


def _described(request: Request, part: range, rows: Iterator[list[float]]) -> list[TokenLogprob]:
    top = request.params.prompt_logprobs or 0
    return [described(next(rows), request.prompt[token], top) for token in part]
