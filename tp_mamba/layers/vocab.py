"""The embedding and the language-model head, cut over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.linear import linear
from tp_mamba.layers.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from tp_mamba.layers.init import initialize
from tp_mamba.layers.linear import check_rank_count
from tp_mamba.layers.weights import for_activations
from tp_mamba.parallel.collectives import gather_from_tp
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.partial import Partial, Scattered, whole
from tp_mamba.parallel.sharding import Shard


class VocabParallelTable(ShardedModule):
    """Rows ``[V/n, H]`` of a table, V rounded up to a multiple of n, drawn from N(0, 0.02) (GPT-2's value)."""

    weight: nn.Parameter

    def __init__(
        self, num_embeddings: int, embedding_dim: int, tp: TensorParallel | None, prefix: str
    ) -> None:
        super().__init__(tp, prefix)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def add_weight(self, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Hold this rank's rows.

        Raises:
            ValueError: more ranks than rows.
        """
        check_rank_count(self.num_embeddings, self.tp, self.prefix)
        shard = Shard(shape=(self.num_embeddings, self.embedding_dim), dim=0)
        self.add_parameter("weight", shard, dtype=dtype, device=device)
        initialize(self, "weight", lambda full: full.normal_(std=0.02))


class VocabParallelEmbedding(VocabParallelTable):
    """Embedding table cut by row; forward all-reduce of the looked-up rows, backward no collective.

    ``ids [...]`` -> ``[..., H]`` on every rank. A rank looks up the ids of its own rows and gives zeros for
    the others, so the sum has one non-zero term and is exact in any dtype.

    Attributes:
        out_dtype: dtype of the result; None for that of the table.
    """

    out_dtype: torch.dtype | None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "embeddings",
    ) -> None:
        """Rank ``tp.rank``'s rows of a table of ``num_embeddings`` (V) rows of ``embedding_dim`` (H).

        Raises:
            ValueError: more ranks than rows.
        """
        super().__init__(num_embeddings, embedding_dim, tp, prefix)
        self.add_weight(dtype, device)

    def partial(self, ids: torch.Tensor) -> Partial:
        """``ids [...]`` integer, each in ``0..V-1`` (the caller checks) -> this rank's term of ``[..., H]``."""
        rows = self.weight.shape[0]
        if rows >= self.num_embeddings:  # all of them are here
            return Partial(F.embedding(ids, self.weight).to(self.out_dtype), self.tp)
        local = ids - self.tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight).to(self.out_dtype)
        return Partial(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.tp)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids [...]`` integer, each in ``0..V-1`` (the caller checks) -> ``[..., H]``."""
        return self.partial(ids).sum()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tp={self.tp.rank}/{self.tp.size}"


class ParallelLMHead(VocabParallelTable):
    """The output projection cut by vocabulary row; forward all-gather of the logits.

    ``h [..., H]`` replicated -> float32 logits ``[..., V]``, whole on every rank and the same bits there:
    each logit is computed by one rank only. Rows that pad V to a multiple of n are cut off.
    Backward: this rank's slice of the logit gradients, and an all-reduce of ``dh``. :meth:`losses` needs no gather.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        tie_to: VocabParallelEmbedding | None = None,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "lm_head",
    ) -> None:
        """Rank ``tp.rank``'s rows of the head; ``tie_to`` shares the embedding's parameter.

        Raises:
            ValueError: more ranks than rows.
        """
        super().__init__(num_embeddings, embedding_dim, tp, prefix)
        # Not a child of this module: a tuple hides it from nn.Module.
        self._tied_to = () if tie_to is None else (tie_to,)
        if tie_to is None:
            self.add_weight(dtype, device)
        else:
            self.weight = tie_to.weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ParallelLMHead:
        """As ``nn.Module``; where the embedding got a new parameter (``to_empty``), the tie is to that one."""
        for embedding in self._tied_to:
            if self.weight is not embedding.weight:
                self.weight = embedding.weight
                return self
        super()._apply(fn, recurse)
        return self

    def forward(self, h: torch.Tensor | Scattered, rows: torch.Tensor | None = None) -> torch.Tensor:
        """``h [..., H]``, or those of its rows that are asked for, -> float32 or wider logits ``[..., V]``."""
        logits = gather_from_tp(self._local(h, rows), self.tp)[..., : self.num_embeddings]
        return logits.to(wide_dtype(logits.dtype))

    def columns(self, h: torch.Tensor | Scattered, rows: torch.Tensor | None = None) -> torch.Tensor:
        """This rank's columns ``[..., W]`` of the logits, padding at the end of the last ranks' included."""
        local = self._local(h, rows)
        return local.to(wide_dtype(local.dtype))

    def _local(self, h: torch.Tensor | Scattered, rows: torch.Tensor | None) -> torch.Tensor:
        h = whole(h, self.tp)
        if rows is not None:
            h = h[rows]
        return linear(h, for_activations(self.weight, h))

    def losses(
        self, h_TH: torch.Tensor | Scattered, labels_T: torch.Tensor, *, ignore_index: int = IGNORE_INDEX
    ) -> torch.Tensor:
        """Cross-entropy of each token, ``h [T, H]`` and labels ``[T]`` -> ``[T]``, the same bits on every rank.

        Forward: all-gather of three numbers per token. Backward: all-reduce of ``dh``. See
        :func:`tp_mamba.layers.cross_entropy.linear_cross_entropy`.
        """
        return linear_cross_entropy(
            whole(h_TH, self.tp),
            self.weight,
            labels_T,
            self.tp,
            vocab_size=self.num_embeddings,
            ignore_index=ignore_index,
        )

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, {self.num_embeddings}, tp={self.tp.rank}/{self.tp.size}"
