"""What a Mamba-1 model looks like: its sizes, switches and vocabulary."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tp_mamba.checkpoint.config_families import parse_config, render_config
from tp_mamba.checkpoint.config_fields import CORRECT_IT
from tp_mamba.checkpoint.errors import ConfigError
from tp_mamba.checkpoint.location import resolve

MODEL_TYPES = ("mamba", "falcon_mamba", "jamba")
MIXER_NORMS = ("none", "weightless", "weighted")
ACTIVATIONS = ("silu", "swish")

USE_ANOTHER = "give a model that keeps to this, or correct its config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class MambaConfig:
    """One Mamba-1 model, in the names of transformers' configurations.

    Raises:
        ConfigError: a value is outside what Mamba-1 or the kernels allow (see each field).
    """

    model_type: str
    """``"mamba"`` (raw state-spaces files too), ``"falcon_mamba"`` or ``"jamba"`` (its mixer only)."""

    hidden_size: int
    """``H``, the width of the residual stream."""

    intermediate_size: int
    """``D``, the inner channels of a mixer (d_inner)."""

    num_hidden_layers: int
    """Number of blocks."""

    state_size: int
    """``N``, 1 to 256."""

    conv_kernel: int
    """``K``, the width of the causal convolution, 2 to 4."""

    time_step_rank: int
    """``R``, the rank of the dt projection."""

    vocab_size: int
    """``V``, rows of the stored embedding, padding of the file included."""

    layer_norm_epsilon: float = 1e-5
    """Epsilon of the block norms and the final norm."""

    use_bias: bool = False
    """Whether ``in_proj`` and ``out_proj`` have a bias."""

    use_conv_bias: bool = True
    """Whether the convolution has a bias."""

    hidden_act: str = "silu"
    """Activation of convolution and gate; ``"swish"`` is the same function."""

    residual_in_fp32: bool = True
    """Whether the residual stream is float32 whatever the model's dtype."""

    tie_word_embeddings: bool = True
    """Whether ``lm_head`` shares the embedding's weight."""

    mixer_norm: str = "none"
    """RMSNorm on dt, B and C: ``"none"``, ``"weightless"`` (FalconMamba) or ``"weighted"`` (Jamba)."""

    mixer_rms_eps: float = 1e-6
    """Epsilon of that norm."""

    usable_vocab_size: int | None = None
    """Ids at or above it are padding of the file and are never sampled; None: every row is a token."""

    bos_token_id: int | None = None
    """Id that begins a text, if there is one."""

    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a text."""

    pad_token_id: int | None = None
    """Id of padding, if there is one."""

    dtype: torch.dtype | None = None
    """Dtype the checkpoint declares; None where it declares none."""

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Fields of the original config.json that nothing here reads; :meth:`to_dict` gives them back."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("model_type", MODEL_TYPES),
            ("mixer_norm", MIXER_NORMS),
            ("hidden_act", ACTIVATIONS),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name} is {value!r}, supported are {', '.join(allowed)}: {USE_ANOTHER}")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "time_step_rank", "vocab_size"):
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {size}, it must be at least 1: {CORRECT_IT}")
        if not 1 <= self.state_size <= 256:
            raise ConfigError(f"state_size is {self.state_size}, the kernels take 1 to 256: {USE_ANOTHER}")
        if not 2 <= self.conv_kernel <= 4:
            raise ConfigError(
                f"conv_kernel is {self.conv_kernel}, the kernels take widths 2 to 4: {USE_ANOTHER}"
            )
        for name in ("layer_norm_epsilon", "mixer_rms_eps"):
            if not (math.isfinite(eps := getattr(self, name)) and eps >= 0):
                raise ConfigError(f"{name} is {eps}, it must be a finite number of at least 0: {CORRECT_IT}")
        if self.usable_vocab_size is not None and not 1 <= self.usable_vocab_size <= self.vocab_size:
            raise ConfigError(
                f"usable_vocab_size is {self.usable_vocab_size}, it must be 1 to vocab_size ({self.vocab_size}): "
                f"{CORRECT_IT}"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MambaConfig:
        """The model described by the content of a ``config.json`` of any supported family.

        Required are the sizes H, layers and V: ``hidden_size``, ``num_hidden_layers`` and ``vocab_size`` (raw
        state-spaces files: ``d_model``, ``n_layer``, ``vocab_size``). Absent fields of another kind have the
        defaults of the family's own reader:

        * raw, in ``ssm_cfg``, as mamba_ssm: ``d_state`` 16, ``d_conv`` 4, ``expand`` 2, ``dt_rank`` ``"auto"``
          (``ceil(H / 16)``), ``bias`` false, ``conv_bias`` true; beside it ``residual_in_fp32``, ``rms_norm`` and
          ``tie_embeddings`` true, ``pad_vocab_size_multiple`` 8. (mamba_ssm has no field for the epsilon, 1e-5.)
        * mamba and falcon_mamba, as transformers: ``state_size`` 16, ``conv_kernel`` 4, ``expand`` 2,
          ``intermediate_size`` ``expand * H``, ``time_step_rank`` ``"auto"``, ``layer_norm_epsilon`` 1e-5,
          ``use_bias`` false, ``use_conv_bias``, ``residual_in_fp32`` and ``tie_word_embeddings`` true,
          ``hidden_act`` silu, token ids 0; falcon_mamba ``mixer_rms_eps`` 1e-6.
        * jamba, as transformers: ``mamba_d_state`` 16, ``mamba_d_conv`` 4, ``mamba_expand`` 2, ``mamba_dt_rank``
          ``"auto"``, ``mamba_conv_bias`` true, ``mamba_proj_bias`` and ``tie_word_embeddings`` false,
          ``rms_norm_eps`` 1e-6, ids of beginning, end and padding 1, 2 and 0.

        An -hf file may repeat sizes under their raw names (``d_model``, ``n_layer``, ``d_inner``), and must then
        repeat them rightly.

        Raises:
            ConfigError: a needed field is missing, has the wrong type, contradicts another, or asks for
                something that is not Mamba-1.
        """
        return cls(**parse_config(fields))

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path) -> MambaConfig:
        """The model of a checkpoint folder or of a name on the Hugging Face hub (only config.json is fetched).

        Raises:
            CheckpointError: there is no such folder or name, or it has no config.json.
            ConfigError: as :meth:`from_dict`, with the file's path; also where the file is not a JSON object.
        """
        path = resolve(path_or_name, config_only=True) / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path.parent} has no config.json: give the folder of a checkpoint") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}): fetch or write it again") from None
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{path} holds a JSON {type(fields).__name__}, it must be an object of fields: fetch or write it again"
            )
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and :meth:`from_dict` load as this model."""
        return render_config(self)
