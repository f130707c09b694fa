"""The Triton kernels of the scan's backward: interpreted on tiny shapes, compiled for Hopper, and on a GPU."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import DEVICES, Launches, compile_for_hopper, double, to, triton_device
from scan_testing import loop_of
from test_selective_scan import make
from test_selective_scan_backward import check, randn, reference, run

from tp_mamba.kernels.selective_scan import differentiable, selective_scan
from tp_mamba.kernels.selective_scan.arguments import ScanBackward
from tp_mamba.kernels.selective_scan.launch import BackwardPlan, backward_plan, backward_plan_of


def kernel_module(name: str) -> Any:
    """A module of kernels as the op has it now: ``triton_device`` imports another one for the interpreter."""
    return importlib.import_module(f"tp_mamba.kernels.selective_scan.{name}")


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state every 4 tokens, groups of 2 and segments of 4, so that few tokens make several of each."""

    def plan(*sizes: int) -> BackwardPlan:
        return backward_plan_of(*sizes, steps=2, part=2, segment=4)

    monkeypatch.setattr(differentiable, "SAVE_EVERY", 4)
    monkeypatch.setattr(kernel_module("backward_mixer"), "backward_plan", plan)


def force_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module("backward_mixer"), "serves", lambda call, grads: False)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("kernel", ["mixer", "any"])
def test_everything_at_once(where: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softplus, a large bias, skip, gate, states at both ends, an empty sequence, channels that fill no block."""
    device = triton_device(where, monkeypatch)
    small_steps(monkeypatch)
    if kernel == "any":
        force_any(monkeypatch)
    n = 8 if kernel == "mixer" else 3
    inputs = make(6, n, [7, 0, 1], seed=1)
    inputs["delta_bias"][:2] = 5.0
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}
    inputs["initial_states"] = randn(3, 6, n, seed=2)
    check(inputs, device, randn(3, 6, n, seed=3))


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("kernel", ["mixer", "any"])
def test_nothing_but_the_recurrence(where: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = triton_device(where, monkeypatch)
    small_steps(monkeypatch)
    if kernel == "any":
        force_any(monkeypatch)
    inputs = make(5, 4, [5], seed=5) | {"D": None, "z": None, "delta_bias": None, "delta_softplus": False}
    inputs |= {"delta": inputs["delta"].abs() * 0.1}
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}
    check(inputs, device)


@pytest.mark.parametrize("where", DEVICES)
def test_dense_groups(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel-major with groups, for which only the general kernel is; and token-major dense, for the mixer's."""
    device = triton_device(where, monkeypatch)
    small_steps(monkeypatch)
    x, grouped = randn(2, 4, 5, seed=7), randn(2, 2, 4, 5, seed=8)
    inputs = {"u": x, "delta": 0.1 * x.abs(), "A": -randn(4, 4, seed=9).exp(), "B": grouped, "C": grouped}
    check(inputs, device)
    by_token = {name: inputs[name].mT.contiguous().mT for name in ("u", "delta")}
    check(
        inputs | by_token | {"B": grouped[:, 0].mT.contiguous().mT, "C": grouped[:, 1].mT.contiguous().mT},
        device,
    )


@pytest.mark.parametrize("where", DEVICES)
def test_tokens_of_no_sequence(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero in the output and in every gradient, from both kernels."""
    device = triton_device(where, monkeypatch)
    small_steps(monkeypatch)
    inputs = make(5, 4, [1, 2, 1], seed=11)
    for name in ("u", "delta", "z", "B", "C"):
        inputs[name] = inputs[name].t().contiguous().t()
        inputs[name][:, 0] = inputs[name][:, 3] = float("nan")
    inputs["query_start_loc"] = torch.tensor([1, 3], dtype=torch.int32)
    on_device, upstream = to(inputs, device), randn(5, 4, seed=12).to(device)
    for _ in range(2):
        out, grads = selective_scan(**on_device), run(on_device, upstream)
        for x in (out, *(grads[name] for name in ("u", "delta", "z", "B", "C"))):
            assert not x[:, [0, 3]].any()
            assert x[:, 1:3].any()
        assert all(grad.isfinite().all() for grad in grads.values())
        force_any(monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softplus", [True, False])
def test_long_sequences_on_a_gpu(softplus: bool, dtype: torch.dtype) -> None:
    """Several stretches and blocks of channels, against plain torch in float64, which other tests hold."""
    inputs = make(200, 16, [1000, 3, 0, 129], dtype, seed=13)
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}
    if not softplus:
        steps = torch.nn.functional.softplus(inputs["delta"].float() - 2).to(dtype)
        inputs |= {"delta": steps, "delta_bias": None, "delta_softplus": False}
    upstream = torch.empty_like(inputs["u"]).copy_(randn(200, 1132, seed=14))
    exact = run(double(inputs), upstream.double())
    on_device = to(inputs | {"upstream": upstream}, torch.device("cuda"))
    given = on_device.pop("upstream")
    first, second = run(on_device, given), run(on_device, given)
    plain = reference(on_device, given)  # in the dtype, with the same GPU's exponential
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name
        error, allowed = ((x.cpu().double() - exact[name]).norm() for x in (grad, plain[name]))
        # A sum does not average away what ex2.approx errs to one side.
        bound = 2 * allowed + torch.finfo(torch.float32).eps * exact[name].norm()
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}"


def compile_backward(sequences: int, channels: int, softplus: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel that a mixer's backward launches, compiled for Hopper."""
    module = kernel_module("backward_mixer")
    kernel, recorded = module.selective_scan_backward_kernel, Launches()
    plan = backward_plan(8, sequences, channels, 16, differentiable.SAVE_EVERY, True)
    monkeypatch.setattr(module, "selective_scan_backward_kernel", recorded)
    monkeypatch.setattr(module, "backward_plan", lambda *sizes: plan)
    T, D, N = 8, 128, 16
    x, z, bc = (
        torch.zeros(T, D, dtype=torch.bfloat16),
        torch.zeros(T, 2 * D, dtype=torch.bfloat16),
        torch.zeros(T, 2 * N),
    )
    call = ScanBackward(
        x.t(), None, x.t(), x.t(), torch.zeros(N, D).t(), bc[:, :N].t()[None], bc[:, N:].t()[None], torch.zeros(D),
        z[:, D:].t(), torch.zeros(D) if softplus else None, torch.zeros(1, N, D), softplus,
        torch.tensor([0, T], dtype=torch.int32), differentiable.SAVE_EVERY, False,
    )  # fmt: skip
    grads = call.gradients()
    assert module.serves(call, grads)
    module.launch(call, grads)
    return compile_for_hopper(kernel, recorded.calls[0])


@pytest.mark.pinned_toolchain
def test_compiles_for_hopper_without_spills_in_its_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither spills nor shuffles in the loop over groups of tokens (outside it, addresses are), and no atomics."""
    compiled = compile_backward(1, 8192, False, monkeypatch)
    loop = loop_of(compiled.asm["cubin"], tmp_path, innermost=True)
    assert sum(line.startswith("FFMA") for line in loop) > 150  # the one that is meant
    assert not [line for line in loop if line.startswith(("LDL", "STL", "SHFL"))]
    assert not re.search(r"^\s*(@!?%p\d+ )?(atom|red)\.", compiled.asm["ptx"], re.MULTILINE)
