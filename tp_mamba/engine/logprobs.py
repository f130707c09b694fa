"""Logarithms of probabilities: of the token that stands at a place, and of the likeliest that might.

They are those of the model's logits as they are, before any penalty, bias or temperature, over all ids of the
vocabulary. A row is scored in float64, and every number is then rounded to float32. The value of a token that is among
the likeliest is the very float that stands in their list: both are the same function of the same two numbers.

Equal logits are listed in order of id, so greedy choice takes the first of the list. To have that order whatever a
library does with equal values, a logit and its id are made one integer, and integers are compared.

Letters: ``B`` rows, ``V`` vocabulary, ``W`` columns of a rank, ``n`` ranks, ``k`` places of a list.
"""

from __future__ import annotations

import torch

from tp_mamba.engine.cut_vocabulary import CutVocabulary

_ID_BITS = 32


def score_rows(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    top: int,
    *,
    usable: int,
    cut: CutVocabulary | None = None,
) -> torch.Tensor:
    """Score ``tokens [B]`` int64 against the rows of ``logits [B, V]``, or of this rank's columns ``[B, W]``.

    Args:
        tokens: ids of the vocabulary; a row of another number gets values that mean nothing.
        top: ``k``, how many of the likeliest to list; as many as there are, if that is less.
        usable: ids at or above it are not listed.
        cut: which columns ``logits`` are; None for all.

    Returns:
        ``[B, 1 + 2 k]`` float64, the same on every rank: of each row the logarithm of its token's probability, then
        those of the likeliest, then their ids.
    """
    logits = logits.float()
    start, real = 0, logits.shape[1]
    if cut is not None:
        start, real = cut.start, cut.real
        logits = logits.masked_fill(_beyond(logits, real), -torch.inf)
    wide = logits.double()
    highest, tokens = wide.amax(-1, keepdim=True), tokens[:, None] - start
    here = (tokens >= 0) & (tokens < real)
    own = wide.gather(1, tokens.clamp(0, logits.shape[1] - 1)).masked_fill(~here, -torch.inf)
    keys = _keys(logits.masked_fill(_beyond(logits, usable - start), -torch.inf), start)
    keys = keys.topk(min(top, usable, keys.shape[1]), dim=-1).values
    if cut is not None:
        highest_of_rank, own_of_rank = cut.gather(torch.cat([highest, own], dim=1)).unbind(-1)
        highest, own = highest_of_rank.amax(0)[:, None], own_of_rank.amax(0)[:, None]
        keys = cut.gather(keys).movedim(0, 1).flatten(1)
        keys = keys.topk(min(top, usable), dim=-1).values
    total = (wide - highest).exp_().sum(-1, keepdim=True)
    if cut is not None:
        total = cut.gather(total).sum(0)
    norm = highest + total.log()
    values, ids = _logits_and_ids(keys)
    logprobs = (torch.cat([own, values.double()], dim=1) - norm).float()
    return torch.cat([logprobs.double(), ids.double()], dim=1)


def _beyond(logits: torch.Tensor, columns: int) -> torch.Tensor:
    """``[W]`` bool: all but the first ``columns``."""
    return torch.arange(logits.shape[1], device=logits.device) >= columns


def _keys(logits: torch.Tensor, start: int) -> torch.Tensor:
    """Integers in the order of float32 ``logits [B, W]``, of equal ones the one with the lower id before the others."""
    bits = (logits + 0.0).view(torch.int32)  # one zero, not two
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(start, start + logits.shape[1], device=logits.device)
    return (ordered << _ID_BITS) | (2**_ID_BITS - 1 - ids)


def _logits_and_ids(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`_keys` was made of."""
    ordered = (keys >> _ID_BITS).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), 2**_ID_BITS - 1 - (keys & (2**_ID_BITS - 1))
