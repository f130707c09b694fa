"""What the tests of gradients share: mixers of every kind, a model in plain torch, and gradients of full tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_mamba.mixer import MambaMixer
from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors

EXACT = 1e-10
"""Relative error that float64 gradients may have, of each tensor's norm."""

KINDS = ("mamba", "falcon", "jamba")

Tensors = dict[str, torch.Tensor]


def make_mixer(kind: str, tp: TensorParallel, **options: Any) -> MambaMixer:
    """A trainable mixer: :data:`KINDS` have every width, bias and norm once, and channels that 2, 3 and 4 ranks pad."""
    H, N, K, D, R, conv_bias, bias, norm, weighted = {
        "mamba": (6, 4, 3, 13, 3, True, True, False, True),
        "falcon": (5, 3, 2, 11, 2, False, False, True, False),
        "jamba": (7, 5, 4, 14, 4, True, True, True, True),
        "large": (64, 16, 4, 160, 8, True, True, True, True),
    }[kind]
    options = {"dtype": torch.float64, "trainable": True, "tp": tp, **options}
    mixer = MambaMixer(H, N, K, D, R, conv_bias, bias, norm, weighted, 1e-6, **options)
    draw(mixer)
    return mixer


def draw(module: nn.Module, seed: int = 0) -> None:
    """Parameters of the same full tensors at every number of ranks, none of them at a value that hides it."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in sharded_tensors(module):
        shape = tensor.shard.shape
        spread = 0.5 if tensor.shard.wide or len(shape) == 1 else shape[-1] ** -0.5
        full = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        if "norm" in tensor.path:
            full += 1
        device, held = tensor.param.device, tensor.param.dtype
        tensor.module.load_full(tensor.attribute, full.to(device=device, dtype=held))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers of N(0, 1), the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(module: nn.Module) -> Tensors:
    """This rank's gradient of every parameter, by its name in a checkpoint."""
    found = {}
    for tensor in sharded_tensors(module):
        assert tensor.param.grad is not None, f"{tensor.name} has no gradient"
        found[tensor.name] = tensor.param.grad
    return found


def merged(parts: list[Tensors], module: nn.Module) -> Tensors:
    """Full gradients from those of every rank. What every rank holds whole must be the same bits on all of them."""
    full = {}
    for tensor in sharded_tensors(module):
        locals_ = [part[tensor.name] for part in parts]
        if tensor.shard.dim is None:
            assert all(torch.equal(local, locals_[0]) for local in locals_), (
                f"{tensor.name} differs between ranks"
            )
        full[tensor.name] = tensor.shard.merge(locals_)
    return full


def assert_close(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], rtol: float = EXACT
) -> None:
    """Every tensor of ``expected`` is in ``found``, with an error below ``rtol`` of its norm."""
    assert set(found) >= set(expected)
    for name, tensor in expected.items():
        error = float((found[name] - tensor).norm() / tensor.norm())
        assert error < rtol, f"{name} is {error:.1e} off"


class CountingCommunicator(Communicator):
    """Collectives that are sent, and counted."""

    def __init__(self) -> None:
        self.all_reduced: list[tuple[int, ...]] = []
        self.gathered: list[tuple[int, ...]] = []
        self.scattered: list[tuple[int, ...]] = []

    def all_reduce_(self, x: torch.Tensor, tp: Any) -> torch.Tensor:
        self.all_reduced.append(tuple(x.shape))
        return super().all_reduce_(x, tp)

    def all_gather(self, x: torch.Tensor, tp: Any) -> torch.Tensor:
        self.gathered.append(tuple(x.shape))
        return super().all_gather(x, tp)

    def reduce_scatter(self, x: torch.Tensor, tp: Any) -> torch.Tensor:
        self.scattered.append(tuple(x.shape))
        return super().reduce_scatter(x, tp)


def reference_mixer(mixer: MambaMixer, p: Tensors, h_TH: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The mixer of full parameters ``p``, one sequence and one token after the other, in torch's own operators."""
    D, N, R = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        if not mixer.use_rms_norm:
            return x
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * p[f"{name}.weight"] if f"{name}.weight" in p else x

    ys = []
    for h in h_TH.split(lengths):
        x, z = F.linear(h, p["in_proj.weight"], p.get("in_proj.bias")).split(D, -1)
        padded = F.pad(x.t(), (mixer.conv_kernel_size - 1, 0))
        u = F.silu(F.conv1d(padded[None], p["conv1d.weight"], p.get("conv1d.bias"), groups=D)[0].t())
        dt, B, C = F.linear(u, p["x_proj.weight"]).split([R, N, N], -1)
        dt, B, C = normed(dt, "dt_layernorm"), normed(B, "b_layernorm"), normed(C, "c_layernorm")
        delta = F.softplus(F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"]))
        A, state = -torch.exp(p["A_log"]), torch.zeros(D, N, dtype=h.dtype)
        for t in range(len(h)):
            state = torch.exp(delta[t, :, None] * A) * state + delta[t, :, None] * B[t] * u[t, :, None]
            y = (state @ C[t] + p["D"] * u[t]) * F.silu(z[t])
            ys.append(F.linear(y, p["out_proj.weight"], p.get("out_proj.bias")))
    return torch.stack(ys)


def broken(module: Any, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Replace ``module.name`` until the result is called, on the rank that calls this."""
    before = getattr(module, name)
    setattr(module, name, replacement)
    return lambda: setattr(module, name, before)
