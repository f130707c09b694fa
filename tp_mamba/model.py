"""Mamba-1 language models, tensor-parallel: Mamba and FalconMamba, with the module names of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tp_mamba.batch import NULL_SLOT, MambaMetadata, MambaMetadataBuilder
from tp_mamba.checkpoint.dtype import checkpoint_dtype
from tp_mamba.checkpoint.load import load_model
from tp_mamba.checkpoint.location import resolve
from tp_mamba.checkpoint.save import save_model
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.config import MambaConfig
from tp_mamba.layers.init import initialization_skipped, skip_init
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from tp_mamba.mixer import MambaMixer, MambaState
from tp_mamba.options import resolve_dtype
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.state.store import MambaCache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tp_mamba.engine.generate import GenerationResult, TokenEvent
    from tp_mamba.engine.params import SamplingParams


def build_mixer(
    config: MambaConfig,
    *,
    tp: TensorParallel | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    prefix: str = "",
) -> MambaMixer:
    """The mixer that ``config`` describes (Mamba, FalconMamba or one of Jamba's Mamba layers)."""
    return MambaMixer(
        config.hidden_size,
        config.state_size,
        config.conv_kernel,
        config.intermediate_size,
        config.time_step_rank,
        use_conv_bias=config.use_conv_bias,
        use_bias=config.use_bias,
        use_rms_norm=config.mixer_norm != "none",
        rms_norm_has_weight=config.mixer_norm == "weighted",
        rms_norm_eps=config.mixer_rms_eps,
        activation=config.hidden_act,
        prefix=prefix,
        tp=tp,
        dtype=dtype,
        device=device,
    )


class MambaBlock(nn.Module):
    """``residual += h; h = mixer(norm(residual))``."""

    def __init__(
        self,
        config: MambaConfig,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(
            config.hidden_size,
            config.layer_norm_epsilon,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix=f"{prefix}.norm",
        )
        self.mixer = build_mixer(config, tp=tp, dtype=dtype, device=device, prefix=f"{prefix}.mixer")

    def forward(
        self,
        h_TH: torch.Tensor,
        residual_TH: torch.Tensor | None,
        metadata: MambaMetadata,
        state: MambaState | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``h [T, H]`` and the running residual (None before the first block) -> the same two."""
        h_TH, residual_TH = self.norm.add(h_TH, residual_TH, residual_in_fp32=self.residual_in_fp32)
        return self.mixer(h_TH, metadata, state), residual_TH


class MambaModel(nn.Module):
    """Embedding, blocks and final norm: ``ids [T] -> h [T, H]``."""

    def __init__(
        self,
        config: MambaConfig,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
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
            MambaBlock(config, tp=tp, dtype=dtype, device=device, prefix=f"backbone.layers.{i}")
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

    def forward(self, ids_T: torch.Tensor, metadata: MambaMetadata, cache: MambaCache | None) -> torch.Tensor:
        """Packed ids ``[T]`` -> the normed hidden states ``[T, H]`` of every token."""
        h_TH, residual_TH = self.embeddings(ids_T), None
        for i, block in enumerate(self.layers):
            h_TH, residual_TH = block(h_TH, residual_TH, metadata, None if cache is None else cache.layer(i))
        h_TH, _ = self.norm_f.add(h_TH, residual_TH, residual_in_fp32=self.residual_in_fp32)
        return h_TH


class MambaForCausalLM(nn.Module):
    """A Mamba-1 language model over the ranks of ``tp``.

    Attributes:
        config: its sizes and options.
        tp: the ranks it is split over.
        dtype, device: of its parameters on this rank (``A``, ``D`` and dt biases are at least float32).
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
            config: a Mamba or FalconMamba configuration.
            tp: the ranks; one rank by default.
            dtype: of the parameters; by default the configuration's, else torch's default.
            device: by default ``tp.device``; ``"meta"`` gives shapes without memory.

        Raises:
            ValueError: a Jamba configuration (its attention and expert layers are not part of this package), or
                more ranks than channels.
        """
        super().__init__()
        if config.model_type not in ("mamba", "falcon_mamba"):
            raise ValueError(
                f"a whole {config.model_type} model cannot be built here, only Mamba and FalconMamba: take its Mamba "
                "layers one by one with tp_mamba.model.build_mixer and tp_mamba.checkpoint.load.load_mixer"
            )
        self.config, self.tp = config, checked(tp)
        self.dtype = resolve_dtype(dtype or config.dtype or torch.get_default_dtype(), None, "dtype")
        self.device = torch.device(device if device is not None else self.tp.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {str(self.device)!r} but torch finds no GPU: use device='cpu'")
        self.checkpoint_folder: Path | None = None
        self.backbone = MambaModel(config, tp=self.tp, dtype=self.dtype, device=self.device)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            tie_to=self.backbone.embeddings if config.tie_word_embeddings else None,
            tp=self.tp,
            dtype=self.dtype,
            device=self.device,
        )
        self._scale_residual_branches()
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def _scale_residual_branches(self) -> None:
        """mamba_ssm's ``_init_weights``: every layer adds to one sum, so each starts ``1 / sqrt(layers)`` as large."""
        if initialization_skipped() or self.device.type == "meta":
            return
        for mixer in self.mixers():
            mixer.out_proj.weight.div_(len(self.backbone.layers) ** 0.5)
            for projection in (mixer.in_proj, mixer.out_proj):
                if projection.bias is not None:
                    projection.bias.zero_()

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        tp: TensorParallel | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> MambaForCausalLM:
        """Load a published checkpoint, or one that ``tp-mamba shard`` wrote; every rank calls this.

        Each rank reads its own slices only, one tensor at a time, straight to its device.

        Args:
            path_or_name: a folder, or a name on the Hugging Face hub, which is downloaded.
            tp: the ranks; one rank by default.
            dtype: of the parameters; by default what the checkpoint declares, else what its tensors have.
            device: by default ``tp.device``.
            progress: called with (what, bytes read, bytes to read) as loading goes on.

        Raises:
            ValueError: the checkpoint is missing, incomplete, damaged, or not a Mamba-1 model.
            RankFailedError: another rank could not load its part.
        """
        tp = checked(tp)
        with tp.agreed():
            folder = resolve(path_or_name)
            config = MambaConfig.from_pretrained(folder)
            if dtype is None and config.dtype is None:
                dtype = checkpoint_dtype(open_source(folder, rank=tp.rank, size=tp.size))
            with skip_init():
                model = cls(config, tp, dtype, device)
        load_model(model, folder, progress)
        model.checkpoint_folder = folder
        return model

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the full checkpoint in the ``-hf`` layout, which transformers loads; every rank calls this.

        Raises:
            OSError: the files cannot be written; an older checkpoint at ``path`` stays as it was.
            RankFailedError: rank 0 could not write them.
        """
        save_model(self, Path(path))

    def mixers(self) -> list[MambaMixer]:
        """The mixer of every layer, in order."""
        return [block.mixer for block in self.backbone.layers]  # type: ignore[misc]

    def new_cache(self, slots: int) -> MambaCache:
        """State for ``slots`` sequences, on this model's device.

        Raises:
            ValueError: ``slots`` below 1.
        """
        return MambaCache(self.mixers(), slots)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of whole sequences, from their beginning.

        Args:
            input_ids: ``[B, L]`` integers in ``0..V-1``, the same on every rank.

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
        low, high = (int(edge) for edge in torch.aminmax(input_ids))
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"got token ids between {low} and {high}, the vocabulary has ids 0 to {self.config.vocab_size - 1}: "
                "use the tokenizer that belongs to this checkpoint"
            )
        B, L = input_ids.shape
        metadata = MambaMetadataBuilder(self.device).build(
            prefill_slots=[NULL_SLOT] * B, prefill_lengths=[L] * B, has_initial_states=[False] * B
        )
        h_TH = self.backbone(input_ids.to(self.device).flatten(), metadata, None)
        return self.lm_head(h_TH).view(B, L, -1)

    def forward_packed(
        self,
        input_ids: torch.Tensor,
        metadata: MambaMetadata,
        cache: MambaCache,
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
        if cache.conv_states.shape[0] != len(self.backbone.layers):
            raise ValueError(
                f"got a cache of {cache.conv_states.shape[0]} layers for a model of {len(self.backbone.layers)}: "
                "make it with this model's new_cache()"
            )
        if list(input_ids.shape) != [metadata.num_tokens]:
            raise ValueError(
                f"got input_ids of shape {list(input_ids.shape)}, the metadata describes [{metadata.num_tokens}] "
                "packed tokens: pass the metadata built for this batch"
            )
        h_TH = self.backbone(input_ids, metadata, cache)
        return self.lm_head(h_TH if logits_indices is None else h_TH[logits_indices])

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch_size: int | None = None,
        max_prefill_tokens: int = 8192,
    ) -> Iterator[TokenEvent]:
        """Generate for ``prompts`` token by token; see :func:`tp_mamba.engine.generate.stream`."""
        from tp_mamba.engine.generate import stream

        return stream(
            self,
            prompts,
            params,
            tokenizer,
            max_batch_size=max_batch_size,
            max_prefill_tokens=max_prefill_tokens,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch_size: int | None = None,
        max_prefill_tokens: int = 8192,
    ) -> list[GenerationResult]:
        """Generate for ``prompts`` of any lengths; see :func:`tp_mamba.engine.generate.generate`."""
        from tp_mamba.engine.generate import generate

        return generate(
            self,
            prompts,
            params,
            tokenizer,
            max_batch_size=max_batch_size,
            max_prefill_tokens=max_prefill_tokens,
        )
