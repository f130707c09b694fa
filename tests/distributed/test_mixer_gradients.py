"""Gradients through the mixer's projections at 1, 2 and 3 ranks; the kernels between them have no backward.

What the scan will do with dt, B and C is stood in for by a product that, like it, uses all of B and C in every
channel: that is where an identity backward gives gradients that are 35-120 % off.
"""

from __future__ import annotations

import pytest
import torch

from tp_mamba.mixer import MambaMixer
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import Shard

T, D = 5, 14


def _gradients(tp: TensorParallel) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    mixer = MambaMixer(6, 4, 3, D, 3, True, False, False, tp=tp, dtype=torch.float64)
    mixer.x_proj.weight.requires_grad_()
    mixer.dt_proj.weight.requires_grad_()
    channels = Shard(shape=(T, D), dim=1)
    u, dy = (channels.shard(torch.randn(T, D, dtype=torch.float64), tp.rank, tp.size) for _ in range(2))
    u.requires_grad_()
    dt, B, C = mixer._project_time_steps(u)
    delta, _ = mixer.dt_proj(dt)
    (delta * (B * C).sum(-1, keepdim=True)).backward(dy)
    return {"u": u.grad, "x_proj": mixer.x_proj.weight.grad, "dt_proj": mixer.dt_proj.weight.grad}


@pytest.mark.parametrize("n", [2, 3])
def test_gradients_of_dt_b_and_c_are_whole(ranks, n: int) -> None:
    one = _gradients(TensorParallel(device="cpu"))
    parts = ranks(n).run(_gradients)
    mixer = MambaMixer(6, 4, 3, D, 3, True, False, False)
    splits = {
        "u": Shard(shape=(T, D), dim=1),
        "x_proj": mixer.x_proj.shards["weight"],
        "dt_proj": mixer.dt_proj.shards["weight"],
    }
    for name, split in splits.items():
        merged = split.merge([part[name] for part in parts])
        torch.testing.assert_close(
            merged, one[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def _bfloat16_time_steps(tp: TensorParallel) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    mixer = MambaMixer(6, 4, 3, 64, 3, True, False, False, tp=tp, dtype=torch.bfloat16)
    u = Shard(shape=(T, 64), dim=1).shard(torch.randn(T, 64).bfloat16(), tp.rank, tp.size)
    return mixer._project_time_steps(u)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_b_and_c_keep_the_float32_of_the_sum(ranks, n: int) -> None:
    """bf16 weights and inputs: dt is rounded once, for its GEMM; B and C are not rounded at all."""
    torch.manual_seed(1)
    whole = MambaMixer(6, 4, 3, 64, 3, True, False, False, dtype=torch.bfloat16)
    u = torch.randn(T, 64).bfloat16()
    exact = u.double() @ whole.x_proj.weight.double().t()
    for dt, B, C in ranks(n).run(_bfloat16_time_steps):
        assert (dt.dtype, B.dtype, C.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        torch.testing.assert_close(torch.cat([B, C], -1).double(), exact[:, 3:], rtol=1e-5, atol=1e-6)
        assert torch.equal(dt, exact[:, :3].float().bfloat16())
