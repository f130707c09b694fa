"""The causal language model that every family is: embedding, its blocks, final norm and head, tensor-parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tp_mamba.batch import MambaMetadata, whole_sequences
from tp_mamba.layers.init import initialization_skipped
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.registry import Family, get_family
from tp_mamba.options import resolve_dtype
from tp_mamba.parallel.group import TensorParallel, checked


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
    ) -> None:
        """The blocks are those of ``family``.

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
        self.layers = nn.ModuleList(
            family.build_block(config, i, tp=tp, dtype=dtype, device=device, prefix=f"backbone.layers.{i}")
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

    def forward(self, ids_T: torch.Tensor, metadata: MambaMetadata, cache: StateCache | None) -> torch.Tensor:
        """Packed ids ``[T]`` -> the normed hidden states ``[T, H]`` of every token."""
        h_TH, residual_TH = self.embeddings.partial(ids_T), None
        for i, block in enumerate(self.layers):
            h_TH, residual_TH = block(h_TH, residual_TH, metadata, None if cache is None else cache.layer(i))
        normed_TH, _ = self.norm_f.add(h_TH, residual_TH, residual_in_fp32=self.residual_in_fp32)
        return normed_TH


class CausalLM(nn.Module):
    """A language model over the ranks of ``tp``, with the module names of transformers.

    It knows how to compute, and nothing of files or of generation: :class:`tp_mamba.model.MambaForCausalLM` adds
    those.

    Attributes:
        config: its sizes and options.
        tp: the ranks it is split over.
        checkpoint_folder: where it was loaded from, None for a model that was not.
    """

    def __init__(
        self,
        config: MambaConfig,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
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

        Raises:
            ValueError: a Jamba configuration (its attention and expert layers are not part of this package), or
                more ranks than channels or rows of the vocabulary.
        """
        super().__init__()
        self.config, self.tp = config, checked(tp)
        dtype = resolve_dtype(dtype or config.dtype or torch.get_default_dtype(), None, "dtype")
        device = resolve_device(device, self.tp)
        self.checkpoint_folder: Path | None = None
        family = get_family(config.model_type)
        self.backbone = Backbone(config, family, tp=self.tp, dtype=dtype, device=device)
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

    def mixers(self) -> list[Any]:
        """The layer of every block that keeps state, in order: a :class:`tp_mamba.mixer.MambaMixer` in Mamba."""
        return [block.mixer for block in self.backbone.layers]

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
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            found = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"got input_ids in {found}: token ids are a tensor of int64 or int32")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"got input_ids of shape {list(input_ids.shape)}, expected [B, L] with at least one token: "
                "an empty prompt has no next token"
            )
        if not torch.compiler.is_compiling():
            self._check_range(input_ids)
        B, L = input_ids.shape
        h_TH = self.backbone(input_ids.to(self.device).flatten(), whole_sequences(B, L, self.device), None)
        return self.lm_head(h_TH).view(B, L, -1)

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
    ) -> torch.Tensor:
        """Logits of a packed batch that continues, and updates, the slots its metadata names.

        Checks nothing that would make the host wait for the device: ids outside the vocabulary and slots outside
        the cache are the caller's to refuse.

        Args:
            input_ids: ``[T]``, decode tokens first.
            metadata: what the tokens are.
            cache: the states.
            logits_indices: which tokens' logits are wanted; all by default.

        Returns:
            float32 ``[len(logits_indices) or T, V]``, whole and the same bits on every rank.

        Raises:
            ValueError: ``input_ids`` is not ``[metadata.num_tokens]``, or ``cache`` is another model's.
        """
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
        h_TH = self.backbone(input_ids, metadata, cache)
        return self.lm_head(h_TH if logits_indices is None else h_TH[logits_indices])
