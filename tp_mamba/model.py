"""The public model: :class:`tp_mamba.models.base.CausalLM` with its ways in from files, out to files, and to text.

Here the parts meet: models know nothing of checkpoints, states and engines, which all know models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer

from tp_mamba.checkpoint.companions import read_companions
from tp_mamba.checkpoint.dtype import checkpoint_dtype
from tp_mamba.checkpoint.load import load_model
from tp_mamba.checkpoint.location import resolve
from tp_mamba.checkpoint.refusals import refuse_other_depth
from tp_mamba.checkpoint.save import save_model
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.config import MambaConfig
from tp_mamba.engine import generate as generation
from tp_mamba.engine.intake import Prompts
from tp_mamba.engine.params import SamplingParams
from tp_mamba.models.activations import activation_bytes_per_token
from tp_mamba.models.base import CausalLM, resolve_device
from tp_mamba.models.block import build_mixer
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.state.cache import MambaCache
from tp_mamba.state.identity import describe_config
from tp_mamba.state.store import bytes_per_slot

__all__ = ["MambaForCausalLM", "build_mixer"]


class MambaForCausalLM(CausalLM):
    """A Mamba-1 language model over the ranks of ``tp``: Mamba, FalconMamba, or a registered family.

    Attributes:
        config: its sizes and options.
        tp: the ranks it is split over.
        dtype, device: of its parameters on this rank (``A``, ``D`` and dt biases are at least float32).
        checkpoint_folder: where it was loaded from, None for a model that was not.
    """

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        tp: TensorParallel | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        trainable: bool = False,
        compute_dtype: torch.dtype | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """Load a published checkpoint, or one that ``tp-mamba shard`` wrote; every rank calls this.

        Each rank reads its own slices only, one tensor at a time, straight to its device. Where generation_config.json
        names end-of-text ids or the id of padding, they take the place of those in config.json; nothing else of it is
        applied.

        Args:
            path_or_name: a folder, or a name on the Hugging Face hub, which is downloaded.
            tp: the ranks; one rank by default.
            dtype: of the parameters; by default what the checkpoint declares, else what its tensors have.
            device: by default ``tp.device``.
            trainable, compute_dtype: as of :class:`~tp_mamba.models.base.CausalLM`.
            progress: called with (what, bytes read, bytes to read) as loading goes on.

        Raises:
            ValueError: the checkpoint is missing, incomplete, damaged, or not a Mamba-1 model.
            RankFailedError: another rank could not load its part.
        """
        tp = checked(tp)
        with tp.agreed():
            folder = resolve(path_or_name)
            config = MambaConfig.from_pretrained(folder)
            companions = read_companions(folder)
            if companions.eos_token_ids is not None:
                config = replace(config, eos_token_ids=companions.eos_token_ids)
            if companions.pad_token_id is not None:
                config = replace(config, pad_token_id=companions.pad_token_id)
            source = open_source(folder, rank=tp.rank, size=tp.size)
            refuse_other_depth(config, source)
            if dtype is None and config.dtype is None:
                dtype = checkpoint_dtype(source)
            device = resolve_device(device, tp)
            # It gets memory once the files are known to be its own: a damaged config.json may ask for any size.
            model = cls(config, tp, dtype, "meta", trainable=trainable, compute_dtype=compute_dtype)
        load_model(model, folder, progress, device=device)
        model.checkpoint_folder = folder
        return model

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the full checkpoint as its family publishes it; every rank calls this.

        Of Mamba and FalconMamba that is the ``-hf`` layout, which transformers loads.

        Raises:
            OSError: the files cannot be written; an older checkpoint at ``path`` stays as it was.
            RankFailedError: rank 0 could not write them.
        """
        save_model(self, Path(path))

    def new_cache(self, slots: int) -> MambaCache:
        """State for ``slots`` sequences, on this model's device.

        Raises:
            ValueError: ``slots`` below 1.
        """
        return MambaCache(self.mixers(), slots, model=describe_config(self.config), device=self.device)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one sequence's state on this rank, all layers."""
        return bytes_per_slot(self.mixers())

    @property
    def activation_bytes_per_token(self) -> int:
        """Bytes that the activations of one packed token take on this rank at their peak, logits not counted."""
        return activation_bytes_per_token(self.config, self.tp.size, self.dtype)

    def stream(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> generation.TokenStream:
        """Generate for ``prompts`` token by token; see :func:`tp_mamba.engine.generate.stream`."""
        return generation.stream(self, prompts, params, tokenizer, **options)

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> list[generation.GenerationResult]:
        """Generate for ``prompts`` of any lengths; see :func:`tp_mamba.engine.generate.generate`."""
        return generation.generate(self, prompts, params, tokenizer, **options)
