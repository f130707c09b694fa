"""The causal language model that every family is: embedding, its blocks, final norm and head, tensor-parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tp_mamba.batch import MambaMetadata, check_rows, next_tokens, whole_sequences
from tp_mamba.layers.cross_entropy import IGNORE_INDEX
from tp_mamba.layers.init import initialization_skipped
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.layers.recompute import check_level
from tp_mamba.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.registry import Family, get_family
from tp_mamba.options import resolve_compute_dtype, resolve_dtype
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.parallel.partial import Scattered, whole


class StateCache(Protocol):
    """What a model asks of a cache: the states of each of its layers."""

    @property
    def num_layers(self) -> int:
        """How many layers it keeps states of."""

    def layer(self, index: int) -> Any:
        """The states of layer ``index``, as that layer takes them."""


def resolve_device(device: torch.device | str | None, tp: TensorParallel) -> torch.device:
    """The device of a model that was asked for on ``device``, None for the default.

    Raises:
        ValueError: a GPU where torch finds none.
    """
    if device is None:
        device = "meta" if torch.get_default_device().type == "meta" else tp.device
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} but torch finds no GPU: use device='cpu'")
    return device


class Backbone(nn.Module):
    """Embedding, blocks and final norm: ``ids [T] -> h [T, H]``."""

    def __init__(
        self,
        config: MambaConfig,
        family: Family,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str | None,
        trainable: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """The blocks are those of ``family``, which is told of training only where that is asked for.

        Raises:
            ValueError: ``family`` has no blocks, or there are more ranks than channels or rows of the vocabulary.
        """
        super().__init__()
        if family.build_block is None:
            raise ValueError(
                f"a whole {family.model_type} model cannot be built here, only Mamba and FalconMamba: take its Mamba "
                "layers one by one with tp_mamba.model.build_mixer and tp_mamba.checkpoint.load.load_mixer"
            )
        limit = min(config.intermediate_size, config.vocab_size)
        if tp.size > limit:
            raise ValueError(
                f"a model of {config.intermediate_size} channels and {config.vocab_size} vocabulary rows is too "
                f"small for {tp.size} tensor-parallel ranks: use at most {limit} ranks"
            )
        self.residual_in_fp32 = config.residual_in_fp32
        self.embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix="backbone.embeddings",
        )
        self.embeddings.out_dtype = compute_dtype
        training = {"trainable": True, "compute_dtype": compute_dtype} if trainable else {}
        self.layers = nn.ModuleList(
            family.build_block(
                config, i, tp=tp, dtype=dtype, device=device, prefix=f"backbone.layers.{i}", **training
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm_f = RMSNorm(
            config.hidden_size,
            config.layer_norm_epsilon,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix="backbone.norm_f",
        )

    def forward(
        self, ids_T: torch.Tensor, metadata: MambaMetadata, cache: StateCache | None
    ) -> torch.Tensor | Scattered:
        """Packed ids ``[T]`` -> the normed hidden states ``[T, H]`` of every token."""
        h_TH, residual_TH = self.embeddings.partial(ids_T), None
        for i, block in enumerate(self.layers):
            h_TH, residual_TH = block(h_TH, residual_TH, metadata, None if cache is None else cache.layer(i))
        normed_TH, _ = self.norm_f.add(
            h_TH, residual_TH, residual_in_fp32=self.residual_in_fp32, by_rows=True
        )
        return normed_TH


class CausalLM(nn.Module):
    """A language model over the ranks of ``tp``, with the module names of transformers.

    It knows how to compute, and nothing of files or of generation: :class:`tp_mamba.model.MambaForCausalLM` adds
    those.

    Attributes:
        config: its sizes and options.
        tp: the ranks it is split over.
        trainable: whether it was built for training.
        checkpoint_folder: where it was loaded from, None for a model that was not.
    """

    gives_cut_logits = True

    def __init__(
        self,
        config: MambaConfig,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        trainable: bool = False,
        compute_dtype: torch.dtype | str | None = None,
    ) -> None:
        """A model with the initial values of mamba_ssm; the same seed gives the same model at every rank count.

        That is: embeddings from N(0, 0.02), biases of the projections zero, and out_proj divided by the square root
        of the number of layers, on top of what each layer and mixer draws.

        Args:
            config: the configuration of a family whose whole models can be built.
            tp: the ranks; one rank by default.
            dtype: of the parameters; by default the configuration's, else torch's default.
            device: by default the meta device inside ``with torch.device("meta")``, else ``tp.device``. On the meta
                device a model has shapes and no memory; ``to_empty(device=...)`` gives it memory, to be filled.

            trainable: for :meth:`loss`: parameters take gradients, and mixers hold ``A_log`` in the place of ``A``.
            compute_dtype: of the activations of a trainable model, by default ``dtype``; bfloat16 or float16 with
                float32 parameters, of which each product rounds a copy.

        Raises:
            ValueError: a Jamba configuration (its attention and expert layers are not part of this package), more ranks
                than channels or rows of the vocabulary, or a ``compute_dtype`` that does not go with ``dtype``.
        """
        super().__init__()
        self.config, self.tp = config, checked(tp)
        dtype = resolve_dtype(dtype or config.dtype or torch.get_default_dtype(), None, "dtype")
        device = resolve_device(device, self.tp)
        self.trainable = trainable
        if compute_dtype is not None:
            compute_dtype = resolve_compute_dtype(compute_dtype, dtype, "compute_dtype")
            if compute_dtype != dtype and not trainable:
                raise ValueError(
                    f"compute_dtype={compute_dtype} with parameters in {dtype} is for training: set trainable=True, or "
                    f"give dtype={compute_dtype}"
                )
        self.checkpoint_folder: Path | None = None
        self._checkpoint_level = 0
        family = get_family(config.model_type)
        self.backbone = Backbone(
            config,
            family,
            tp=self.tp,
            dtype=dtype,
            device=device,
            trainable=trainable,
            compute_dtype=compute_dtype,
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            tie_to=self.backbone.embeddings if config.tie_word_embeddings else None,
            tp=self.tp,
            dtype=dtype,
            device=device,
        )
        if not (initialization_skipped() or device.type == "meta"):
            for block in self.backbone.layers:
                block.scale_residual_branch(len(self.backbone.layers))  # type: ignore[operator]
        if not trainable:
            self.requires_grad_(False)
            self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters (``A``, ``D`` and the dt biases are at least float32)."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters of this rank are."""
        return next(self.parameters()).device

    @property
    def checkpoint_level(self) -> int:
        """What :meth:`loss` leaves to its backward to compute again instead of keeping it.

        0: nothing; 1: the convolution and the time steps; 2: each whole layer. The gradients are the same bits, see
        :mod:`tp_mamba.layers.recompute`. Setting it raises ValueError for another number.
        """
        return self._checkpoint_level

    @checkpoint_level.setter
    def checkpoint_level(self, level: int) -> None:
        self._checkpoint_level = check_level(level)
        for block in self.backbone.layers:
            block.checkpoint_level = level  # type: ignore[assignment]

    def mixers(self) -> list[Any]:
        """The layer of every block that keeps state, in order: a :class:`tp_mamba.mixer.MambaMixer` in Mamba."""
        return [block.mixer for block in self.backbone.layers]

    @property
    def cache_config(self) -> Any:
        """How its layers were told to keep states: what the first one's constructor got, None for the defaults."""
        return getattr(self.mixers()[0], "cache_config", None)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of whole sequences, from their beginning.

        Args:
            input_ids: ``[B, L]`` integers in ``0..V-1``, the same on every rank. Under ``torch.compile`` their
                range is the caller's to check: looking at values would stop the graph.

        Returns:
            float32 logits ``[B, L, V]``, whole and the same bits on every rank.

        Raises:
            ValueError: not two-dimensional, empty, or ids outside the vocabulary.
        """
        self._check_ids(input_ids, dims=2)
        if not torch.compiler.is_compiling():
            self._check_range(input_ids)
        B, L = input_ids.shape
        h_TH = self.backbone(input_ids.to(self.device).flatten(), whole_sequences(B, L, self.device), None)
        return self.lm_head(h_TH).view(B, L, -1)

    def _check_ids(self, input_ids: torch.Tensor, dims: int) -> None:
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            found = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"got input_ids in {found}: token ids are a tensor of int64 or int32")
        if input_ids.dim() != dims or input_ids.numel() == 0:
            expected = "[B, L]" if dims == 2 else "packed [T]"
            raise ValueError(
                f"got input_ids of shape {list(input_ids.shape)}, expected {expected} with at least one token: "
                "an empty prompt has no next token"
            )

    def _check_range(self, input_ids: torch.Tensor) -> None:
        low, high = (int(edge) for edge in torch.aminmax(input_ids))
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"got token ids between {low} and {high}, the vocabulary has ids 0 to {self.config.vocab_size - 1}: "
                "use the tokenizer that belongs to this checkpoint"
            )

    def forward_packed(
        self,
        input_ids: torch.Tensor,
        metadata: MambaMetadata,
        cache: StateCache,
        logits_indices: torch.Tensor | None = None,
        *,
        whole_vocab: bool = True,
    ) -> torch.Tensor:
        """Logits of a packed batch that continues, and updates, the slots its metadata names.

        Checks nothing that would make the host wait for the device: ids outside the vocabulary and slots outside
        the cache are the caller's to refuse.

        Args:
            input_ids: ``[T]``, decode tokens first.
            metadata: what the tokens are.
            cache: the states.
            logits_indices: which tokens' logits are wanted; all by default.
            whole_vocab: gather the logits of all ranks; otherwise each has its own columns.

        Returns:
            float32 ``[len(logits_indices) or T, V]``, whole and the same bits on every rank; or this rank's columns
            ``[..., W]``, ``W`` the vocabulary over the ranks, rounded up.

        Raises:
            ValueError: ``input_ids`` is not ``[metadata.num_tokens]``, or ``cache`` is another model's.
        """
        hidden = self.forward_hidden(input_ids, metadata, cache)
        return self.logits(hidden, logits_indices, whole_vocab=whole_vocab)

    def forward_hidden(
        self, input_ids: torch.Tensor, metadata: MambaMetadata, cache: StateCache
    ) -> torch.Tensor:
        """As :meth:`forward_packed`, up to the head: the normed hidden states ``[T, H]``, the same on every rank."""
        if cache.num_layers != len(self.backbone.layers):
            raise ValueError(
                f"got a cache of {cache.num_layers} layers for a model of {len(self.backbone.layers)}: "
                "make it with this model's new_cache()"
            )
        if list(input_ids.shape) != [metadata.num_tokens]:
            raise ValueError(
                f"got input_ids of shape {list(input_ids.shape)}, the metadata describes [{metadata.num_tokens}] "
                "packed tokens: pass the metadata built for this batch"
            )
        hidden = self.backbone(input_ids, metadata, cache)
        return whole(hidden, self.tp) if isinstance(hidden, Scattered) else hidden

    def logits(
        self, hidden: torch.Tensor, rows: torch.Tensor | None = None, *, whole_vocab: bool = True
    ) -> torch.Tensor:
        """Logits of ``hidden [T, H]``, or of those of its ``rows`` that are asked for; see :meth:`forward_packed`."""
        head = self.lm_head if whole_vocab else self.lm_head.columns
        return head(hidden, rows)

    def loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        metadata: MambaMetadata | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """Cross-entropy in nats per token, for training and validation; no rank ever holds the logits of all tokens.

        Every rank gives the same arguments and gets the same bits. Called under autograd, ``backward()`` on the result
        gives each rank the gradients of its own parameters, whole.

        Args:
            input_ids: ``[B, L]``, one sequence per row; or packed ``[T]``, with ``metadata``.
            labels: in the shape of ``input_ids``, for each token the one that follows it, or ``ignore_index``. By
                default the next token of the same sequence, and none for the last. (transformers takes the ids
                themselves and shifts them.)
            metadata: where the sequences of a packed batch are, such as
                ``packed_sequences(lengths, device)`` of :mod:`tp_mamba.batch`; each from its beginning, without slots.
            ignore_index: the label of a token that does not count.
            reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``: as they are, zero where ignored.

        Returns:
            a scalar, or for ``"none"`` the shape of ``input_ids``, in float32 (float64 in a float64 model). A label
            outside the vocabulary gives NaN.

        Raises:
            ValueError: shapes that do not fit one another, ids of another dtype or (looked at on a CPU) outside the
                vocabulary, or another reduction.
            RuntimeError: gradients are tracked and the batch has decode rows or slots.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'got reduction {reduction!r}: use "mean", "sum" or "none"')
        self._check_ids(input_ids, dims=2 if metadata is None else 1)
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"got labels of shape {list(labels.shape)} for input_ids of shape {list(input_ids.shape)}: give one "
                "label per token, the token that follows it"
            )
        if metadata is None:
            B, L = input_ids.shape
            metadata = whole_sequences(B, L, self.device)
        check_rows("input_ids", input_ids.numel(), metadata)
        if input_ids.is_cpu:
            self._check_range(input_ids)
        ids_T = input_ids.to(self.device).flatten()
        if labels is None:
            labels = next_tokens(ids_T, metadata, ignore_index)
        labels_T = labels.to(self.device).flatten()
        h_TH = self.backbone(ids_T, metadata, None)
        losses = self.lm_head.losses(h_TH, labels_T, ignore_index=ignore_index)
        if reduction == "none":
            return losses.view(input_ids.shape)
        total = losses.sum()
        return total if reduction == "sum" else total / (labels_T != ignore_index).sum()
