"""The mixer at 1, 2, 3 and 4 ranks: against transformers in float32, and against one rank in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_factory import randomize
from torch import nn
from transformers import FalconMambaConfig, JambaConfig, MambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaModel
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer as HFMambaMixer

from tp_mamba.mixer import MambaMixer
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors


def _jamba() -> tuple[nn.Module, dict[str, Any]]:
    config = JambaConfig(
        hidden_size=21,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=5,
        mamba_proj_bias=True,
        rms_norm_eps=1e-6,
        use_mamba_kernels=False,
    )
    sizes = (21, 8, 4, 42, 5, True, True)
    return JambaMambaMixer(config, 0), {"sizes": sizes, "norm": (True, True, 1e-6)}


def _falcon() -> tuple[nn.Module, dict[str, Any]]:
    config = FalconMambaConfig(
        hidden_size=12,
        intermediate_size=37,
        state_size=24,
        conv_kernel=2,
        time_step_rank=7,
        use_conv_bias=False,
        num_hidden_layers=1,
        vocab_size=8,
    )
    # Built through the model: transformers' mixer cannot initialise itself alone.
    mixer = FalconMambaModel(config).layers[0].mixer
    return mixer, {"sizes": (12, 24, 2, 37, 7, False, False), "norm": (True, False, 1e-6)}


def _mamba() -> tuple[nn.Module, dict[str, Any]]:
    config = MambaConfig(hidden_size=13, state_size=16, conv_kernel=3, time_step_rank=1, use_bias=True)
    return HFMambaMixer(config, 0), {"sizes": (13, 16, 3, 26, 1, True, True), "norm": (False, True, 1e-5)}


KINDS = {"jamba": _jamba, "falcon": _falcon, "mamba": _mamba}


def _run_mixer(
    tp: TensorParallel, description: dict[str, Any], weights: dict[str, torch.Tensor], h: torch.Tensor
) -> torch.Tensor:
    use_norm, has_weight, eps = description["norm"]
    mixer = MambaMixer(*description["sizes"], use_norm, has_weight, eps, tp=tp, dtype=h.dtype)
    left = dict(weights)
    for tensor in sharded_tensors(mixer):
        tensor.param.weight_loader(tensor.param, left.pop(tensor.name))
    assert not left, f"the mixer has no place for {sorted(left)}"
    return mixer(h)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_against_transformers_and_float64(ranks, kind: str, n: int) -> None:
    oracle, description = KINDS[kind]()
    randomize(oracle, seed=7)
    oracle.eval()
    weights = {name: p.detach() for name, p in oracle.named_parameters()}
    H = description["sizes"][0]
    h = torch.randn(2, 19, H, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = oracle(h)
    for y in ranks(n).run(_run_mixer, description, weights, h):
        assert y.shape == h.shape
        assert (y - expected).norm() <= 1e-4 * expected.norm()

    wide = {name: p.double() for name, p in weights.items()}
    one = _run_mixer(TensorParallel(device="cpu"), description, wide, h.double())
    for y in ranks(n).run(_run_mixer, description, wide, h.double()):
        assert y.dtype == torch.float64
        assert (y - one).norm() <= 1e-12 * one.norm()
