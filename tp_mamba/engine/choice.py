"""From logits to the next tokens: the same choice on every rank, device and batch.

A row's choice is a function of its logits and one uniform number drawn on the host. Probabilities are turned
into integer weights before they are summed: integer sums do not depend on the order of a parallel scan, so no
two ranks can disagree, and the last bits of a logit, which differ between tensor-parallel sizes, are mostly
rounded away. The inverse of the cumulative sum is taken in order of token id, not of probability: two tokens
of nearly equal logits may swap ranks from one run to the next, their ids never do.

Letters: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tp_mamba.engine.params import SamplingParams

NOT_FINITE = -1
"""What :func:`choose` gives for a row whose logits hold no finite maximum."""


@dataclass(frozen=True, slots=True)
class RowParams:
    """The parameters of ``B`` rows: a number where all rows have the same, else a column ``[B, 1]`` on the device.

    One :class:`SamplingParams` serves for rows that are all alike; its fields have the same names.
    """

    temperature: float | torch.Tensor
    """float64 column; 1 for greedy rows, whose draw is not used."""
    top_k: int | torch.Tensor
    """int64 column."""
    top_p: float | torch.Tensor
    """float64 column."""
    min_p: float | torch.Tensor
    """float64 column."""
    repetition_penalty: float | torch.Tensor
    """float64 column."""
    presence_penalty: float | torch.Tensor = 0.0
    """float64 column."""
    frequency_penalty: float | torch.Tensor = 0.0
    """float64 column."""
    greedy: torch.Tensor | None = None
    """``[B]`` bool: rows that take the likeliest token; None if all rows draw, or all are greedy."""
    largest_k: int = 0
    """The largest ``top_k`` of any row, known to the host."""


def choose(
    logits: torch.Tensor,
    params: SamplingParams | RowParams,
    *,
    seen: torch.Tensor | None = None,
    made: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token of each row; nothing waits for the device.

    Args:
        logits: ``[B, V]`` float.
        params: how to choose, for all rows or row by row: a row's token is the same either way.
        seen, made, bias: as in :func:`adjust`.
        uniforms: ``[B]`` float64 in [0, 1); None if every row is greedy.

    Returns:
        ``[B]`` int64, :data:`NOT_FINITE` where a row's largest logit is infinite or any is NaN.
    """
    logits = adjust(logits, params, seen=seen, made=made, bias=bias)
    highest, tokens = logits.max(-1)  # the first of several, as everywhere
    if uniforms is not None:
        greedy = tokens
        tokens = draw(token_weights(logits, params), uniforms)
        if isinstance(params, RowParams) and params.greedy is not None:
            tokens = torch.where(params.greedy, greedy, tokens)
    return torch.where(highest.isfinite(), tokens, NOT_FINITE)


def adjust(
    logits: torch.Tensor,
    params: SamplingParams | RowParams,
    *,
    seen: torch.Tensor | None = None,
    made: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``logits [B, V]`` as a choice takes them; a row for which nothing is to change keeps its bits.

    Args:
        params: the penalties, for all rows or row by row.
        seen: ``[B, V]`` bool, the ids of each row's prompt and text; None for no repetition penalty.
        made: ``[B, V]`` int32, how often each row's text holds each id; None for no presence or frequency penalty.
        bias: ``[B, V]`` float32, added first; None for none.
    """
    if bias is not None:
        logits = logits + bias
    if seen is not None:
        logits = penalise_repetition(logits, seen, params.repetition_penalty)
    if made is not None:
        logits = penalise_counts(logits, made, params.presence_penalty, params.frequency_penalty)
    return logits


def penalise_counts(
    logits: torch.Tensor,
    made: torch.Tensor,
    presence: float | torch.Tensor,
    frequency: float | torch.Tensor,
) -> torch.Tensor:
    """``logits [B, V]`` less ``presence``, once, and ``frequency`` times ``made [B, V]`` where that is not zero."""
    columns = [
        each.to(logits.dtype) if isinstance(each, torch.Tensor) else each for each in (frequency, presence)
    ]
    return logits - made.to(logits.dtype) * columns[0] - (made > 0).to(logits.dtype) * columns[1]


def penalise_repetition(
    logits: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor
) -> torch.Tensor:
    """``logits [B, V]`` with the tokens of ``seen [B, V]`` made less likely, each once.

    A positive logit is divided by ``penalty`` and a negative one multiplied, so that both fall (transformers'
    ``RepetitionPenaltyLogitsProcessor``). A ``penalty`` of 1 changes no bit.
    """
    if isinstance(penalty, torch.Tensor):
        penalty = penalty.to(logits.dtype)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, quotient(logits, penalty)), logits)


def token_weights(logits: torch.Tensor, params: SamplingParams | RowParams) -> torch.Tensor:
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
    relative = relative - relative.amax(-1, keepdim=True)
    quotient(relative, params.temperature, out=relative)
    _keep_top_k(relative, params)
    relative.exp_()
    weights = (relative * scale).round_().long()
    # A column of top_p and min_p changes no row at 1 and at 0: there it drops only what has no weight.
    if isinstance(params.top_p, torch.Tensor) or params.top_p < 1:
        ranked, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        ranked.masked_fill_(before.double() >= params.top_p * ranked.sum(-1, keepdim=True).double(), 0)
        weights = torch.empty_like(weights).scatter_(-1, order, ranked)
    if isinstance(params.min_p, torch.Tensor) or params.min_p > 0:
        weights.masked_fill_(relative < params.min_p, 0)
    return weights


def _keep_top_k(relative: torch.Tensor, params: SamplingParams | RowParams) -> None:
    """Set all but the ``top_k`` largest of each row of ``relative [B, V]`` to -inf; 0 keeps all."""
    vocab_size, top_k = relative.shape[-1], params.top_k
    if not isinstance(top_k, torch.Tensor):
        if 0 < top_k < vocab_size:
            last_kept = relative.topk(top_k, dim=-1).values[:, -1:]
            relative.masked_fill_(relative < last_kept, -torch.inf)
        return
    assert isinstance(params, RowParams)
    ranked = relative.topk(min(params.largest_k, vocab_size), dim=-1).values
    last_kept = ranked.gather(-1, (top_k - 1).clamp(0, ranked.shape[-1] - 1))
    relative.masked_fill_((relative < last_kept) & (top_k > 0), -torch.inf)


def quotient(x: torch.Tensor, by: float | torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x / by`` with the same bits whether ``by`` is a number or a column of that number.

    On a GPU torch may divide by a number in another way than by a tensor (by its reciprocal). Left alone, the last bit
    of a row's weights would depend on whether its neighbours have the same temperature, so there a number becomes a
    tensor.
    """
    if x.is_cuda and not isinstance(by, torch.Tensor):
        by = torch.full((), by, dtype=x.dtype, device=x.device)
    return torch.div(x, by, out=out)


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
