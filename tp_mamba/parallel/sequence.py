"""Sequence parallelism: between layers, where tokens do not meet, each rank works on its share of them.

Without it every rank adds, norms and keeps the residual stream of all tokens. With it the all-reduce behind a
row-parallel layer becomes a reduce-scatter, and an all-gather of the normed rows stands before the next
column-parallel one: the same bytes, 1/n of the norms' work and of the activations that they keep for their backward
(arXiv:2205.05198). It is a way to finish a sum, so it is a communicator::

    TensorParallel(group, communicator=SequenceParallel())

Results and gradients are those of the same model without it, up to the order in which the collectives add.
"""

from __future__ import annotations

import torch

from tp_mamba.parallel.collectives import copy_to_tp, reduce_to_rows
from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.partial import Partial, Scattered


class SequenceParallel(Communicator):
    """Finishes the sum before a norm for this rank's rows only.

    Per layer the forward has a reduce-scatter, an all-gather and x_proj's all-reduce, the backward their duals. What is
    whole on every rank but meets only a share of the tokens, the norms' weights and out_proj's bias, gets a gradient
    that is summed over the ranks, one message of ``[H]`` each.
    """

    def reduce(self, partial: Partial) -> torch.Tensor | Scattered:
        """This rank's rows of the sum ``[T, H]``; the sum itself for one rank.

        Raises:
            ValueError: the sum is not ``[T, H]``.
        """
        tp = partial.tp
        if tp.size == 1:
            return self.sum(partial)
        value = partial.added_slices()
        if value.dim() != 2:
            raise ValueError(
                f"got a sum of shape {list(value.shape)} to divide by rows over the ranks: flatten it to [T, H] first"
            )
        share = reduce_to_rows(value, tp)
        if partial.dtype is not None:
            share = share.to(partial.dtype)
        if partial.bias is not None:
            share = share + copy_to_tp(partial.bias, tp).to(share.dtype)
        return Scattered(share, tp, len(value))
