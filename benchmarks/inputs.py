"""Random inputs of the spread that trained models show, from a generator on the device where they are wanted.

The spread matters: at initial values D is 1, time steps are tiny and norms are 1, so that a forgotten skip or bias
would pass a check; and on zeros a GPU runs faster than on data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tp_mamba.layers.init import skip_init
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.mixer import MambaMixer
from tp_mamba.model import MambaForCausalLM

FORMS = ("full", "mixer")
"""How the scan and the state update are called.

``full``: softplus and bias inside, B and C in bfloat16, as other programs call theirs. ``mixer``: time steps after
softplus, B and C in float32 as halves of one tensor, as this package's mixer calls them."""


def normal(
    generator: torch.Generator,
    *shape: int,
    std: float = 1.0,
    mean: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Independent normal values."""
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return x.mul_(std).add_(mean) if (std, mean) != (1.0, 0.0) else x


def uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Independent float32 values in [0, 1)."""
    return torch.rand(shape, generator=generator, device=generator.device)


def decay_rates(generator: torch.Generator, channels: int, states: int) -> torch.Tensor:
    """``A [D, N]`` from -16 to -0.37, log-uniform, with the channels contiguous."""
    log = uniform(generator, states, channels) * (math.log(16) + 1) - 1
    return -log.exp().t()


def time_step_bias(generator: torch.Generator, channels: int) -> torch.Tensor:
    """``[D]`` float32, of which softplus makes time steps log-uniform from 1e-3 to 1."""
    dt = 10 ** (uniform(generator, channels) * 3 - 3)
    return dt + torch.log(-torch.expm1(-dt))


def starts(sequences: int, length: int, device: torch.device) -> torch.Tensor:
    """``[S + 1]`` int32: where each of ``sequences`` of ``length`` tokens begins, and the last one ends."""
    return torch.arange(0, sequences * length + 1, length, dtype=torch.int32, device=device)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpace:
    """The arguments that scan and state update share, over ``T`` packed tokens."""

    u: torch.Tensor
    """``[T, D]``"""
    z: torch.Tensor
    """``[T, D]``, a half of a ``[T, 2D]`` tensor as in_proj leaves it."""
    delta: torch.Tensor
    """``[T, D]``"""
    delta_bias: torch.Tensor | None
    """``[D]``"""
    delta_softplus: bool
    A: torch.Tensor
    """``[D, N]``, channels contiguous."""
    B: torch.Tensor
    """``[T, N]``, and so ``C``: the two halves of one tensor."""
    C: torch.Tensor
    D: torch.Tensor
    """``[D]``"""

    @classmethod
    def random(
        cls, generator: torch.Generator, tokens: int, channels: int, states: int, form: str
    ) -> StateSpace:
        """Arguments in one of :data:`FORMS`."""
        delta = normal(generator, tokens, channels)
        bias = time_step_bias(generator, channels)
        bc = normal(generator, tokens, 2 * states, dtype=torch.float32 if form == "mixer" else torch.bfloat16)
        if form == "mixer":
            delta = torch.nn.functional.softplus(delta + bias).bfloat16()
        return cls(
            u=normal(generator, tokens, channels),
            z=normal(generator, tokens, 2 * channels)[:, channels:],
            delta=delta,
            delta_bias=bias if form == "full" else None,
            delta_softplus=form == "full",
            A=decay_rates(generator, channels, states),
            B=bc[:, :states],
            C=bc[:, states:],
            D=normal(generator, channels, mean=1.0, std=0.5, dtype=torch.float32),
        )


@torch.no_grad()
def randomize_mixer(mixer: MambaMixer, generator: torch.Generator) -> None:
    """Draw every parameter of ``mixer`` anew."""
    for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
        weight = linear.weight
        weight.copy_(normal(generator, *weight.shape, std=1.2 * weight.shape[1] ** -0.5, dtype=weight.dtype))
    conv = mixer.conv1d
    conv.weight.copy_(normal(generator, *conv.weight.shape, std=0.5, dtype=torch.float32))
    for bias in (mixer.in_proj.bias, mixer.out_proj.bias, conv.bias):
        if bias is not None:
            bias.copy_(normal(generator, *bias.shape, std=0.3, dtype=torch.float32))
    assert mixer.dt_proj.bias is not None
    channels = mixer.intermediate_size_local
    mixer.dt_proj.bias.copy_(time_step_bias(generator, channels))
    mixer.A.copy_(decay_rates(generator, channels, mixer.ssm_state_size))
    mixer.D.copy_(normal(generator, channels, mean=1.0, std=0.5, dtype=torch.float32))
    for norm in (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm):
        if norm is not None:
            randomize_norm(norm, generator)


@torch.no_grad()
def randomize_norm(norm: RMSNorm, generator: torch.Generator) -> None:
    """Draw the weight of ``norm`` anew, if it has one."""
    if norm.weight is not None:
        norm.weight.copy_(normal(generator, *norm.weight.shape, mean=1.0, std=0.3, dtype=torch.float32))


def mixer(
    generator: torch.Generator,
    hidden: int,
    channels: int,
    rank: int,
    *,
    states: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> MambaMixer:
    """A FalconMamba mixer: weightless norms of dt, B and C, a bias in the convolution alone."""
    with skip_init():
        made = MambaMixer(
            hidden,
            states,
            4,
            channels,
            rank,
            use_conv_bias=True,
            use_bias=False,
            use_rms_norm=True,
            rms_norm_has_weight=False,
            rms_norm_eps=1e-6,
            dtype=dtype,
            device=generator.device,
        )
    randomize_mixer(made, generator)
    return made


OUT_PROJ_SHARE = 0.1
"""Of the usual spread, in out_proj of a random model of many layers. At all of it 64 layers turn the rounding of 16
bits into errors of half the logits (0.40 against float64 at H 128, and 0.026 so), and no comparison tells a thing."""


@torch.no_grad()
def randomize_model(model: MambaForCausalLM, generator: torch.Generator) -> None:
    """Draw every parameter of ``model`` anew."""
    embeddings = model.backbone.embeddings.weight
    embeddings.copy_(normal(generator, *embeddings.shape, dtype=embeddings.dtype))
    if model.lm_head.weight is not embeddings:
        head = model.lm_head.weight
        head.copy_(normal(generator, *head.shape, dtype=head.dtype, std=head.shape[1] ** -0.5))
    for block in model.backbone.layers:
        randomize_norm(block.norm, generator)  # type: ignore[arg-type]
        randomize_mixer(block.mixer, generator)  # type: ignore[arg-type]
        block.mixer.out_proj.weight.mul_(OUT_PROJ_SHARE)  # type: ignore[union-attr, operator]
    randomize_norm(model.backbone.norm_f, generator)
