"""The next tokens from logits that stay where they are, cut by vocabulary over the ranks: the same as from whole rows.

Nothing of the size of a row travels. Greedy rows send two numbers per rank. For the others, the largest logit is a
maximum of maxima; top-k needs the ``k`` largest of each rank; sums of integer weights are exact in any order; and the
draw needs the sum of each rank's weights, after which the one rank in whose part it falls names the token.

Top-p needs the weight at which the kept set ends, in order of weight. It is found digit by digit: the ranks add up how
much weight lies in each of 512 bins, the bin in which the sum is reached is cut into 512 again, and so on: four or
five times 4 KiB per row. That is a fixed number of small steps, whatever the probabilities, so nothing waits to decide
what comes next.

Letters: ``B`` rows, ``W`` columns of a rank, ``n`` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tp_mamba.engine.choice import NOT_FINITE, RowParams, adjust, quotient
from tp_mamba.engine.params import SamplingParams
from tp_mamba.parallel.group import TensorParallel

_DIGIT_BITS = 9


@dataclass(frozen=True, slots=True)
class CutVocabulary:
    """Which ids this rank has the logits of: ``start`` up to ``start + width``, where they are below ``usable``."""

    tp: TensorParallel
    width: int
    """``W``, the same on every rank; the last ones may hold padding."""
    usable: int
    """Ids at or above it are never made."""
    vocab_size: int
    """``V``; what lies beyond it only fills up the last ranks."""

    @classmethod
    def of(cls, tp: TensorParallel, vocab_size: int, usable: int) -> CutVocabulary:
        """As the model's head is cut: ``vocab_size`` rounded up to a multiple of ``n``."""
        return cls(tp, -(-vocab_size // tp.size), usable, vocab_size)

    @property
    def start(self) -> int:
        """The first id of this rank."""
        return self.tp.rank * self.width

    @property
    def own(self) -> int:
        """Columns of this rank that may win."""
        return min(max(self.usable - self.start, 0), self.width)

    @property
    def real(self) -> int:
        """Columns of this rank that are ids of the vocabulary."""
        return min(max(self.vocab_size - self.start, 0), self.width)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x [B, ...]`` as ``[n, B, ...]``."""
        return self.tp.all_gather(x, dim=0).view(self.tp.size, *x.shape)


def choose_over_ranks(
    logits: torch.Tensor,
    params: SamplingParams | RowParams,
    cut: CutVocabulary,
    *,
    seen: torch.Tensor | None = None,
    made: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`tp_mamba.engine.sampler.choose` of the whole rows, on every rank.

    Args:
        logits: ``[B, W]`` float, this rank's columns.
        params: how to choose, for all rows or row by row.
        cut: which columns they are.
        seen, made, bias: ``[B, W]``, this rank's columns of what :func:`tp_mamba.engine.choice.adjust` takes.
        uniforms: ``[B]`` float64 in [0, 1), the same on every rank; None if every row is greedy.

    Returns:
        ``[B]`` int64 ids, or ``NOT_FINITE``.
    """
    logits = adjust(logits, params, seen=seen, made=made, bias=bias)
    if cut.own < cut.width:
        padding = torch.arange(cut.width, device=logits.device) >= cut.own
        logits = logits.masked_fill(padding, -torch.inf)
    best = torch.stack([logits.amax(-1).double(), (logits.argmax(-1) + cut.start).double()], dim=-1)
    tops, ids = cut.gather(best).unbind(-1)
    top = tops.amax(0)
    # Of equal ones the first, which is on the lowest rank.
    likeliest = ids.gather(0, tops.argmax(0, keepdim=True)).squeeze(0).long()
    finite = top.isfinite()
    tokens = likeliest
    if uniforms is not None:
        tokens = _draw(_weights(logits, params, cut, top, finite), uniforms, cut)
        if isinstance(params, RowParams) and params.greedy is not None:
            tokens = torch.where(params.greedy, likeliest, tokens)
    return torch.where(finite, tokens, NOT_FINITE)


def _weights(
    logits: torch.Tensor,
    params: SamplingParams | RowParams,
    cut: CutVocabulary,
    top: torch.Tensor,
    finite: torch.Tensor,
) -> torch.Tensor:
    """This rank's columns ``[B, W]`` of :func:`tp_mamba.engine.sampler.token_weights`.

    Rows whose ``top`` is not finite get weights of some kind: their tokens are not used, but must be computable.
    """
    bits = 53 - cut.usable.bit_length()
    relative = logits.double() - top[:, None]
    relative.masked_fill_(~finite[:, None], 0)
    quotient(relative, params.temperature, out=relative)
    _keep_top_k(relative, params, cut)
    relative.exp_()
    weights = (relative * 2.0 ** (bits - 1)).round_().long()
    if isinstance(params.top_p, torch.Tensor) or params.top_p < 1:
        _keep_top_p(weights, params.top_p, cut, bits)
    if isinstance(params.min_p, torch.Tensor) or params.min_p > 0:
        weights.masked_fill_(relative < params.min_p, 0)
    return weights


def _keep_top_k(relative: torch.Tensor, params: SamplingParams | RowParams, cut: CutVocabulary) -> None:
    """Set what is not among the ``top_k`` largest of a whole row to -inf."""
    top_k = params.top_k
    most = top_k if not isinstance(top_k, torch.Tensor) else params.largest_k  # type: ignore[union-attr]
    most = min(most, cut.usable)
    if most == 0 or (not isinstance(top_k, torch.Tensor) and most == cut.usable):
        return
    candidates = cut.gather(relative.topk(min(most, cut.width), dim=-1).values)
    ranked = candidates.movedim(0, 1).flatten(1).topk(most, dim=-1).values
    if not isinstance(top_k, torch.Tensor):
        relative.masked_fill_(relative < ranked[:, -1:], -torch.inf)
        return
    last_kept = ranked.gather(-1, (top_k - 1).clamp(0, most - 1))
    relative.masked_fill_((relative < last_kept) & (top_k > 0), -torch.inf)


def _keep_top_p(weights: torch.Tensor, top_p: float | torch.Tensor, cut: CutVocabulary, bits: int) -> None:
    """Set the ``weights [B, W]`` to zero, each below 2^``bits``, that come after the sum ``top_p`` of a whole row.

    In order of weight, and of id among equals, a token is kept while what is before it is less than that sum.
    """
    total = cut.gather(weights.sum(-1, keepdim=True)).sum(0)
    sum_kept = top_p * total.double()
    digits = torch.arange(2**_DIGIT_BITS, device=weights.device)
    # Of the least weight that is kept, the digits that are known; and the sum of the weights above all that begin so.
    least = above = torch.zeros_like(total)
    for shift in reversed(range(0, bits, _DIGIT_BITS)):
        alike = weights >> (shift + _DIGIT_BITS) == least
        bins = torch.zeros(len(weights), len(digits), dtype=torch.int64, device=weights.device)
        bins.scatter_add_(1, (weights >> shift) % len(digits), weights * alike)
        largest_first = cut.gather(bins).sum(0).flip(1)
        before = above + largest_first.cumsum(1) - largest_first
        kept = (before.double() < sum_kept) & (largest_first > 0)
        last = (kept * digits).amax(1, keepdim=True)
        above = before.gather(1, last)
        least = least * len(digits) + (len(digits) - 1 - last)
    equal = weights == least
    equals_before = (
        cut.gather(equal.sum(-1, keepdim=True))[: cut.tp.rank].sum(0) + equal.cumsum(1) - equal.long()
    )
    kept = (weights > least) | (equal & ((above + equals_before * least).double() < sum_kept))
    weights.masked_fill_(~kept, 0)


def _draw(weights: torch.Tensor, uniforms: torch.Tensor, cut: CutVocabulary) -> torch.Tensor:
    """As :func:`tp_mamba.engine.sampler.draw` of the whole rows."""
    cumulative = weights.cumsum(-1)
    own = cumulative[:, -1]
    totals = cut.gather(own)
    total = totals.sum(0)
    threshold = (total.double() * uniforms).long().minimum(total - 1) - totals[: cut.tp.rank].sum(0)
    here = (threshold >= 0) & (threshold < own)
    token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1) + cut.start
    return cut.gather(token * here).sum(0)
