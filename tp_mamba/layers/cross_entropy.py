"""Cross-entropy of a language model whose vocabulary is cut over the ranks, without the logits of all tokens.

For token t with hidden state ``h_t`` and label ``y_t``, over all rows v of the head ``W [V, H]``::

    loss_t = log(sum_v exp(W_v h_t)) - W_{y_t} h_t
    dh_t   = g_t (sum_v p_tv W_v - W_{y_t})          p_tv = exp(W_v h_t) / sum_v' exp(W_v' h_t), g_t = dL / dloss_t
    dW_v   = sum_t g_t (p_tv - [v = y_t]) h_t

A rank has V/n rows. It takes the tokens in chunks and keeps three numbers of each: the maximum of its logits, the sum
of their exponentials, and the label's logit where it has that row. They travel in one all-gather ``[3, T]``, and every
rank adds them up in rank order, so that the losses are the same bits everywhere. Backward computes the logits of a
chunk again: one product more than if it had them, 2 % of the products of a step at mamba-2.8b's shapes, and nothing of
the size of the logits or of W is kept in between (arXiv:2411.09009). Rows that pad V are left out.

Logits, sums and the gradient of W are in float32 (float64 for float64 ``h``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.linear import linear_partial
from tp_mamba.layers.weights import for_activations
from tp_mamba.parallel.collectives import Ranks

IGNORE_INDEX: Final = -100
"""The label of a token without one, torch's default."""

CHUNK_ELEMENTS: Final = 2**27
"""Logits per chunk at most, 512 MiB of float32."""

_WHOLE: Final = 8
"""Rows of the head are multiplied in whole eights, with rows of zeros behind them: a row of 16-bit logits is then a
multiple of 16 bytes, without which cuBLAS takes kernels of half the speed (a vocabulary of 50280 over two ranks)."""


def linear_cross_entropy(
    h_TH: torch.Tensor,
    weight: torch.Tensor,
    labels_T: torch.Tensor,
    tp: Ranks,
    *,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
    chunk: int | None = None,
) -> torch.Tensor:
    """The loss of each token, from hidden states and this rank's rows of the head.

    Args:
        h_TH: ``[T, H]``, the same on every rank. Its gradient is this rank's term: ``copy_to_tp`` sums them.
        weight: ``[ceil(V / n), H]``, in the dtype of ``h_TH`` or in float32.
        labels_T: ``[T]`` integers in ``0..V-1``, or ``ignore_index``, for which loss and gradient are zero. Another
            label's loss is NaN: looking at values would wait for the device.
        tp: the ranks.
        vocab_size: V, without padding.
        chunk: tokens at a time; by default as many as :data:`CHUNK_ELEMENTS` allows. It changes no loss.

    Returns:
        ``[T]`` in float32 (float64 for float64 ``h_TH``), the same bits on every rank.
    """
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
    first = tp.rank * weight.shape[0]
    rows = min(max(vocab_size - first, 0), weight.shape[0])
    losses: torch.Tensor = _LinearCrossEntropy.apply(
        h_TH, weight, labels_T, tp, first, rows, chunk, ignore_index
    )
    known = (labels_T >= 0) & (labels_T < vocab_size) | (labels_T == ignore_index)
    return losses.masked_fill(~known, float("nan"))


class _LinearCrossEntropy(torch.autograd.Function):
    """loss [T], dh [T, H] of this rank's rows alone, dW [V/n, H]; see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        tp: Ranks,
        first: int,
        rows: int,
        chunk: int,
        ignore_index: int,
    ) -> torch.Tensor:
        stats = h.new_zeros(3, len(h), dtype=wide_dtype(h.dtype))
        stats[0] = -torch.inf  # of a rank that has no rows
        held = _in_whole_eights(for_activations(weight, h)[:rows])
        for part, whole, at, owned in _chunks(h, held, labels, first, rows, chunk):
            logits = whole[:, :rows]
            stats[0, part], _ = logits.max(dim=-1)
            stats[2, part] = logits.gather(1, at)[:, 0] * owned
            stats[1, part] = logits.sub_(stats[0, part, None]).exp_().sum(dim=-1)
        every = tp.all_gather(stats.unsqueeze(0), dim=0)
        most = every[:, 0].amax(dim=0)
        sums, targets = torch.zeros_like(most), torch.zeros_like(most)
        for of_rank in every:
            sums += of_rank[1] * torch.exp(of_rank[0] - most)
            targets += of_rank[2]
        normalizer = most + sums.log()
        ctx.save_for_backward(h, weight, labels, normalizer)
        ctx.first, ctx.rows, ctx.chunk, ctx.ignore_index = first, rows, chunk, ignore_index
        return (normalizer - targets).masked_fill_(labels == ignore_index, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, weight, labels, normalizer = ctx.saved_tensors
        grad = grad.masked_fill(labels == ctx.ignore_index, 0)
        dh = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        held = _in_whole_eights(for_activations(weight, h)[: ctx.rows])
        dW = None
        if ctx.needs_input_grad[1]:
            dW = torch.zeros(held.shape, dtype=wide_dtype(h.dtype), device=h.device)
        for part, logits, at, owned in _chunks(h, held, labels, ctx.first, ctx.rows, ctx.chunk):
            p = logits[:, : ctx.rows].sub_(normalizer[part, None]).exp_()
            logits[:, ctx.rows :] = 0
            # One entry per row, so no two writes meet.
            p.scatter_(1, at, p.gather(1, at) - owned[:, None])
            dlogits = logits.mul_(grad[part, None]).to(h.dtype)
            if dh is not None:
                dh[part] = dlogits @ held
            if dW is not None:
                _add_product(dW, dlogits.t(), h[part])
        if dW is not None:
            dW = _with_rows(dW[: ctx.rows], len(weight)).to(weight.dtype)
        return dh, dW, None, None, None, None, None, None


def _in_whole_eights(weight: torch.Tensor) -> torch.Tensor:
    return _with_rows(weight, -(-len(weight) // _WHOLE) * _WHOLE)


def _with_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x [r, H]`` with rows of zeros behind it, ``[rows, H]``; ``x`` itself where it has as many."""
    return F.pad(x, (0, 0, 0, rows - len(x))) if rows > len(x) else x


def _chunks(
    h: torch.Tensor, held: torch.Tensor, labels: torch.Tensor, first: int, rows: int, chunk: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per chunk of tokens: where it is, logits in whole eights, the labels' rows here ``[c, 1]``, which of them are."""
    if rows == 0:
        return
    for start in range(0, len(h), chunk):
        part = slice(start, start + chunk)
        local = labels[part] - first
        owned = (local >= 0) & (local < rows)
        logits = linear_partial(h[part], held, in_float32=True)
        yield part, logits, local.masked_fill(~owned, 0).long().unsqueeze(1), owned.to(logits.dtype)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` with ``total`` in float32 or wider, unrounded in between."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
