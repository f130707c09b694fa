"""Gradients through the mixer's own forward, at 2 and 3 ranks against one, in float64.

The kernels have no backward, so each is stood in for by plain torch that has one: the convolution by a sum of shifted
products, time steps and scan by the recurrence written out. All else, and every collective, is the mixer's.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tp_mamba.layers import conv, time_steps
from tp_mamba.layers.norm import split_and_norm
from tp_mamba.mixer import MambaMixer
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import Shard, sharded_tensors

T, H, D, R, N = 5, 6, 14, 3, 4


def _conv(
    x_DT: torch.Tensor, weight_DK: torch.Tensor, bias_D: torch.Tensor, *, out: torch.Tensor, **_: Any
) -> None:
    width = weight_DK.shape[1]
    shifted = F.pad(x_DT, (width - 1, 0)).unfold(1, width, 1)
    out.copy_(F.silu((shifted * weight_DK.unsqueeze(1)).sum(-1) + bias_D.unsqueeze(1)))


def _softplus(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.softplus(F.linear(x, weight, bias))


def _scan(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    z: torch.Tensor, *_: Any, out: torch.Tensor, **__: Any,
) -> None:  # fmt: skip
    state, ys = torch.zeros_like(A), []
    for t in range(u.shape[1]):
        dt = delta[:, t, None]
        state = torch.exp(dt * A) * state + dt * B[:, t] * u[:, t, None]
        ys.append((state * C[:, t]).sum(-1) + D * u[:, t])
    out.copy_(torch.stack(ys, dim=1) * F.silu(z))


def _differentiable() -> ExitStack:
    stack = ExitStack()
    for module, name, function in (
        (conv, "causal_conv1d_fn", _conv),
        (time_steps, "linear_softplus", _softplus),
        (time_steps, "selective_scan_fn", _scan),
    ):
        stack.enter_context(mock.patch.object(module, name, function))
    return stack


def _gradients(tp: TensorParallel) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    mixer = MambaMixer(H, N, 3, D, R, True, True, False, tp=tp, dtype=torch.float64)
    for tensor in sharded_tensors(mixer):
        tensor.param.requires_grad_()
    h = torch.randn(T, H, dtype=torch.float64).requires_grad_()
    dy = torch.randn(T, H, dtype=torch.float64)
    with _differentiable():
        y = mixer(h)
        y.backward(dy)
    gradients = {tensor.attribute + tensor.path: tensor.param.grad for tensor in sharded_tensors(mixer)}
    return {"h": h.grad, "y": y.detach(), **gradients}


@pytest.mark.parametrize("n", [2, 3])
def test_every_gradient_is_whole(ranks, n: int) -> None:
    """An identity backward for dt, B and C in the mixer's forward would give gradients that are 35-120 % off."""
    one = _gradients(TensorParallel(device="cpu"))
    parts = ranks(n).run(_gradients)
    mixer = MambaMixer(H, N, 3, D, R, True, True, False)
    shards = {t.attribute + t.path: t.shard for t in sharded_tensors(mixer)}
    assert set(one) == {"h", "y", *shards}
    for name, expected in one.items():
        for part in parts if name not in shards else ():
            torch.testing.assert_close(part[name], expected, rtol=1e-12, atol=1e-12)
        if name in shards:
            merged = shards[name].merge([part[name] for part in parts])
            torch.testing.assert_close(
                merged, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


def _bfloat16_time_steps(tp: TensorParallel) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    mixer = MambaMixer(6, 4, 3, 64, 3, True, False, False, tp=tp, dtype=torch.bfloat16)
    u = Shard(shape=(T, 64), dim=1).shard(torch.randn(T, 64).bfloat16(), tp.rank, tp.size)
    partial = mixer.x_proj.partial(u, slices=True)
    return split_and_norm(partial, None, None, None, time_step_rank=3, state_size=4, dt_dtype=torch.bfloat16)


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
