"""What is said of how likely a token was; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the token at one place was."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there, likeliest first: each with the logarithm of its probability."""


def described(scores: Sequence[float], token: int, top: int) -> TokenLogprob:
    """A row of :func:`tp_mamba.engine.logprobs.score_rows` about ``token``, with the first ``top`` of its list."""
    listed = len(scores) // 2
    pairs = zip(scores[1 + listed : 1 + listed + top], scores[1 : 1 + top], strict=False)
    return TokenLogprob(token, scores[0], tuple((int(id_), logprob) for id_, logprob in pairs))
