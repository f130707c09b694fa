"""The block that the families share, a norm and a mixer, and the mixer that a configuration describes."""

from __future__ import annotations

import torch
from torch import nn

from tp_mamba.batch import MambaMetadata
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.layers.recompute import check_level, recomputed_layer
from tp_mamba.mixer import MambaMixer, MambaState
from tp_mamba.models.config import MambaConfig
from tp_mamba.options import ModelConfig
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial, Scattered


def build_mixer(
    config: MambaConfig,
    *,
    tp: TensorParallel | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    prefix: str = "",
    trainable: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> MambaMixer:
    """The mixer that ``config`` describes (Mamba, FalconMamba or one of Jamba's Mamba layers).

    Args:
        tp: the ranks; one rank by default.
        dtype, device: of the parameters; torch's defaults by default.
        prefix: the mixer's name in checkpoints and messages.
        trainable, compute_dtype: as of :class:`MambaMixer`.

    Raises:
        ValueError: more ranks than channels, or a dtype that parameters cannot have.
    """
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
        model_config=ModelConfig(dtype=dtype or torch.get_default_dtype(), weight_kind=config.weight_kind),
        prefix=prefix,
        tp=tp,
        device=device,
        trainable=trainable,
        compute_dtype=compute_dtype,
    )


class MambaBlock(nn.Module):
    """``residual += h; h = mixer(norm(residual))``.

    Attributes:
        checkpoint_level: what the backward pass computes again (:mod:`tp_mamba.layers.recompute`).
    """

    def __init__(
        self,
        config: MambaConfig,
        index: int,
        *,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str | None,
        prefix: str,
        trainable: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Block ``index`` of a model, all of whose blocks are alike; ``prefix`` is its name in checkpoints."""
        super().__init__()
        self.residual_in_fp32, self._checkpoint_level = config.residual_in_fp32, 0
        self.norm = RMSNorm(
            config.hidden_size,
            config.layer_norm_epsilon,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix=f"{prefix}.norm",
        )
        self.mixer = build_mixer(
            config,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix=f"{prefix}.mixer",
            trainable=trainable,
            compute_dtype=compute_dtype,
        )

    @property
    def checkpoint_level(self) -> int:
        return self._checkpoint_level

    @checkpoint_level.setter
    def checkpoint_level(self, level: int) -> None:
        self._checkpoint_level = check_level(level)
        self.mixer.recomputes = level == 1

    def forward(
        self,
        h_TH: Partial | torch.Tensor,
        residual_TH: torch.Tensor | None,
        metadata: MambaMetadata,
        state: MambaState | None,
    ) -> tuple[Partial | torch.Tensor, torch.Tensor]:
        """``h [T, H]``, for the norm to finish, and the running residual (None before the first block) -> the same."""
        if self._checkpoint_level < 2 or not torch.is_grad_enabled():
            return self._compute(h_TH, residual_TH, metadata, state)
        # What is kept is the sum, this rank's rows of it if the norm works on these.
        summed = h_TH.reduce() if isinstance(h_TH, Partial) else h_TH
        h_TH, residual_TH = recomputed_layer(self._compute, summed, residual_TH, metadata, state)
        return h_TH, residual_TH

    def _compute(
        self,
        h_TH: Partial | Scattered | torch.Tensor,
        residual_TH: torch.Tensor | None,
        metadata: MambaMetadata,
        state: MambaState | None,
    ) -> tuple[Partial | torch.Tensor, torch.Tensor]:
        normed_TH, residual_TH = self.norm.add(
            h_TH,
            residual_TH,
            residual_in_fp32=self.residual_in_fp32,
            by_rows=isinstance(self.mixer, MambaMixer),
        )
        mix = getattr(self.mixer, "partial", self.mixer)  # another layer in its place may finish its own sums
        return mix(normed_TH, metadata, state), residual_TH

    @torch.no_grad()
    def scale_residual_branch(self, layers: int) -> None:
        """mamba_ssm's ``_init_weights``: each of ``layers`` branches starts ``1 / sqrt(layers)`` as large."""
        self.mixer.out_proj.divide_weight_(layers**0.5)
        for projection in (self.mixer.in_proj, self.mixer.out_proj):
            if projection.bias is not None:
                projection.bias.zero_()
