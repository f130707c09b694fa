"""Floating-point work of a training step, and what a device could do at most."""

from __future__ import annotations

import torch

from tp_mamba.models.config import MambaConfig

_PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
"""Part of a GPU's name, and its dense bfloat16 FLOP/s by NVIDIA's data sheets; the first that fits counts."""


def flops_per_token(config: MambaConfig) -> int:
    """FLOPs of the forward and backward products of one token: 6 for each element of each matrix.

    The matrices are in_proj, x_proj, dt_proj, out_proj and the head. The scan, the convolution and what is computed
    again to save memory are not counted, as is usual for the share of peak (arXiv:2204.02311, appendix B).
    """
    H, D, N, R = config.hidden_size, config.intermediate_size, config.state_size, config.time_step_rank
    layer = 2 * D * H + (R + 2 * N) * D + D * R + H * D
    return 6 * (config.num_hidden_layers * layer + config.vocab_size * H)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What ``device`` can do in ``dtype``, FLOP/s; None where that is not known: a CPU, another GPU, float32."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)
