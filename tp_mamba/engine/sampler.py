"""From logits to the next tokens: the same choice on every rank, device and batch.

A row's choice is a function of its logits and one uniform number drawn on the host. Probabilities are turned
into integer weights before they are summed: integer sums do not depend on the order of a parallel scan, so no
two ranks can disagree, and the last bits of a logit, which differ between tensor-parallel sizes, are mostly
rounded away. The inverse of the cumulative sum is taken in order of token id, not of probability: two tokens
of nearly equal logits may swap ranks from one run to the next, their ids never do.

Letters: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from tp_mamba.engine.params import SamplingParams

NOT_FINITE = -1
"""What :func:`choose` gives for a row whose logits hold no finite maximum."""


class UniformStream:
    """Uniform numbers in [0, 1) for one sequence: the ``i``-th depends on seed, index and ``i`` alone.

    Philox is counter-based, and numpy promises not to change its raw output. ``(seed, index)`` is its key.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))

    def next(self) -> float:
        """The next number, a multiple of 2^-53."""
        return (self._bits.random_raw() >> 11) * 2.0**-53


def choose(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    seen: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token of each row; nothing waits for the device.

    Args:
        logits: ``[B, V]`` float.
        params: how to choose.
        seen: ``[B, V]`` bool, the ids of each row's prompt and text; None for no repetition penalty.
        uniforms: ``[B]`` float64 in [0, 1); None for greedy.

    Returns:
        ``[B]`` int64, :data:`NOT_FINITE` where a row's largest logit is infinite or any is NaN.
    """
    if seen is not None:
        logits = penalise_repetition(logits, seen, params.repetition_penalty)
    finite = logits.amax(-1).isfinite()
    tokens = logits.argmax(-1) if uniforms is None else draw(token_weights(logits, params), uniforms)
    return torch.where(finite, tokens, NOT_FINITE)


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """``logits [B, V]`` with the tokens of ``seen [B, V]`` made less likely, each once.

    A positive logit is divided by ``penalty`` and a negative one multiplied, so that both fall (transformers'
    ``RepetitionPenaltyLogitsProcessor``).
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def token_weights(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Integers proportional to the probabilities of the tokens that temperature, top-k, top-p and min-p keep.

    The kept set is that of transformers' ``TemperatureLogitsWarper``, ``TopKLogitsWarper``,
    ``TopPLogitsWarper`` and ``MinPLogitsWarper`` in this order, but for tokens less likely than the likeliest
    by more than the resolution of the weights (about e^-25 at a vocabulary of 50 000), whose weight is 0.

    Args:
        logits: ``[B, V]`` float, each row with a finite maximum.

    Returns:
        ``[B, V]`` int64, 0 for what is dropped; every row sums to at most 2^52.
    """
    vocab_size = logits.shape[-1]
    scale = 2.0 ** (52 - vocab_size.bit_length())  # row sums stay exact in a float64
    relative = logits.double()
    relative = (relative - relative.amax(-1, keepdim=True)).div_(params.temperature)
    if 0 < params.top_k < vocab_size:
        last_kept = relative.topk(params.top_k, dim=-1).values[:, -1:]
        relative.masked_fill_(relative < last_kept, -torch.inf)
    relative.exp_()
    weights = (relative * scale).round_().long()
    if params.top_p < 1:
        ranked, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        ranked.masked_fill_(before.double() >= params.top_p * ranked.sum(-1, keepdim=True).double(), 0)
        weights = torch.empty_like(weights).scatter_(-1, order, ranked)
    if params.min_p > 0:
        weights.masked_fill_(relative < params.min_p, 0)
    return weights


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative sum of ``weights [B, V]`` int64 passes ``uniforms [B]`` of its total.

    Returns:
        ``[B]`` int64; a token of weight 0 is never drawn.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # total * u may round up to total itself, where no token lies
    threshold = (total.double() * uniforms).long().minimum(total - 1)
    return torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
