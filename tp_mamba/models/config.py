"""What a Mamba-1 model looks like: its sizes, switches and vocabulary, whatever its family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self

import torch

from tp_mamba.errors import ConfigError
from tp_mamba.kernels.common.limits import ACTIVATIONS, MAX_CONV_WIDTH, MAX_STATE_SIZE, MIN_CONV_WIDTH
from tp_mamba.layers.weights import DENSE, weight_kinds
from tp_mamba.models.fields import CORRECT_IT
from tp_mamba.models.registry import family_of, get_family
from tp_mamba.quoting import quoted

MIXER_NORMS: Final = ("none", "weightless", "weighted")

MAX_SIZE: Final = 2**24
"""Largest size of any dimension: 256 times the largest published vocabulary, 1024 times the widest mixer."""
MAX_LAYERS: Final = 4096
"""Most blocks of a model. Building one without memory, as a plan does, takes about a millisecond a block."""

USE_ANOTHER: Final = "give a model that keeps to this, or correct its config.json"

_LIMITS: Final = {
    "hidden_size": MAX_SIZE,
    "intermediate_size": MAX_SIZE,
    "num_hidden_layers": MAX_LAYERS,
    "time_step_rank": MAX_SIZE,
    "vocab_size": MAX_SIZE,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MambaConfig:
    """One Mamba-1 model, in the names of transformers' configurations.

    Raises:
        ConfigError: a value is outside what Mamba-1 or the kernels allow (see each field).
    """

    model_type: str
    """The family: ``"mamba"`` (raw state-spaces files too), ``"falcon_mamba"``, ``"jamba"`` (its mixer only), or
    one registered with :func:`tp_mamba.models.registry.register_family`."""

    hidden_size: int
    """``H``, the width of the residual stream, at most 2^24 like every size."""

    intermediate_size: int
    """``D``, the inner channels of a mixer (d_inner)."""

    num_hidden_layers: int
    """Number of blocks, at most 4096."""

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

    weight_kind: str = DENSE
    """What the weights of the projections are: ``"dense"``, or a kind registered with
    :func:`tp_mamba.layers.weights.register_weight_kind`, whose name is ``quantization_config.quant_method``."""

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Fields of the original config.json that nothing here reads; :meth:`to_dict` gives them back."""

    def __post_init__(self) -> None:
        get_family(self.model_type)
        for name, allowed in (
            ("mixer_norm", MIXER_NORMS),
            ("hidden_act", ACTIVATIONS),
            ("weight_kind", weight_kinds()),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(
                    f"{name} is {quoted(value)}, supported are {', '.join(allowed)}: {USE_ANOTHER}"
                )
        for name, limit in _LIMITS.items():
            size = getattr(self, name)
            if not isinstance(size, int):
                raise ConfigError(f"{name} is {quoted(size)}, it must be a whole number: {CORRECT_IT}")
            if size < 1:
                raise ConfigError(f"{name} is {quoted(size)}, it must be at least 1: {CORRECT_IT}")
            if size > limit:
                raise ConfigError(f"{name} is {quoted(size)}, it must be at most {limit:,}: {CORRECT_IT}")
        if not 1 <= self.state_size <= MAX_STATE_SIZE:
            raise ConfigError(
                f"state_size is {quoted(self.state_size)}, the kernels take 1 to {MAX_STATE_SIZE}: {USE_ANOTHER}"
            )
        if not MIN_CONV_WIDTH <= self.conv_kernel <= MAX_CONV_WIDTH:
            raise ConfigError(
                f"conv_kernel is {quoted(self.conv_kernel)}, the kernels take widths {MIN_CONV_WIDTH} to "
                f"{MAX_CONV_WIDTH}: {USE_ANOTHER}"
            )
        for name in ("layer_norm_epsilon", "mixer_rms_eps"):
            if not (math.isfinite(eps := getattr(self, name)) and eps >= 0):
                raise ConfigError(f"{name} is {eps}, it must be a finite number of at least 0: {CORRECT_IT}")
        if self.usable_vocab_size is not None and not 1 <= self.usable_vocab_size <= self.vocab_size:
            raise ConfigError(
                f"usable_vocab_size is {quoted(self.usable_vocab_size)}, it must be 1 to vocab_size "
                f"({self.vocab_size}): {CORRECT_IT}"
            )

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same model, be they of this class or the public :class:`tp_mamba.MambaConfig`."""
        if not isinstance(other, MambaConfig):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(MambaConfig) if f.compare)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The model described by the content of a ``config.json`` of any registered family.

        Which keys are read, and what an absent one stands for, is the family's: see the module ``config`` in its
        folder, such as :mod:`tp_mamba.models.mamba.config`. A key that decides nothing there (of transformers'
        dialect ``expand`` beside ``intermediate_size``, and ``d_model``, ``n_layer`` and ``d_inner``) is not
        looked at.

        Raises:
            ConfigError: a needed field is missing, has the wrong type, or asks for something that is not Mamba-1.
        """
        return cls(**family_of(fields).parse(fields))

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that its family's readers and :meth:`from_dict` load as this model."""
        return get_family(self.model_type).render(self)
