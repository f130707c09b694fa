"""mamba_ssm's ``mamba_inner_fn`` and packed scan (``cu_seqlens``) against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from call_form_testing import PLACES, Memory, copies, randn, scan_inputs, ssm_parameters, starts_of
from conv_norm_testing import run_on
from kernel_testing import assert_within_twice, double

from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference
from tp_mamba.kernels.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn
from tp_mamba.kernels.selective_scan.reference import selective_scan_reference

RANK, N = 5, 8


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inner_inputs(
    d: int, length: int, dtype: torch.dtype, constant: str = "", norms: bool = False
) -> dict[str, Any]:
    """``constant``: which of B and C are parameters. Products in ``dtype``, the other parameters in float32."""
    rows, parameters = RANK + N * (2 - len(constant)), ssm_parameters((d,), N, 1)
    inputs: dict[str, Any] = {
        "xz": randn(2, 2 * d, length, seed=2, dtype=dtype),
        "conv1d_weight": randn(d, 1, 4, seed=3),
        "conv1d_bias": randn(d, seed=4),
        "x_proj_weight": (randn(rows, d, seed=5) * d**-0.5).to(dtype),
        "delta_proj_weight": (randn(d, RANK, seed=6) * RANK**-0.5).to(dtype),
        "out_proj_weight": (randn(d // 2, d, seed=7) * d**-0.5).to(dtype),
        "out_proj_bias": randn(d // 2, seed=8, dtype=dtype),
        "A": parameters["A"],
        "D": parameters["D"],
        "delta_bias": parameters["bias"],
        "B_proj_bias": None if "B" in constant else randn(N, seed=9),
        "C_proj_bias": None if "C" in constant else randn(N, seed=10),
    }
    inputs |= {name: randn(d, N, seed=11) for name in constant}
    if norms:
        inputs |= {"b_rms_weight": randn(N, seed=12), "c_rms_weight": randn(N, seed=13)}
        inputs |= {"dt_rms_weight": randn(RANK, seed=14), "b_c_dt_rms_eps": 1e-3}
    return inputs


def inner_reference(
    p: dict[str, Any], convolve: Any = causal_conv1d_reference, scan: Any = selective_scan_reference
) -> torch.Tensor:
    """The steps of a mixer one after another, each rounded to the dtype of ``xz`` as mamba_ssm rounds it."""
    x, z = p["xz"].chunk(2, dim=1)
    u = convolve(x, p["conv1d_weight"][:, 0], p["conv1d_bias"], "silu")
    projected = F.linear(u.transpose(1, 2), p["x_proj_weight"])
    parts = {"dt": projected[..., :RANK], "B": projected[..., RANK : RANK + N], "C": projected[..., -N:]}
    for name, bias in (("B", p["B_proj_bias"]), ("C", p["C_proj_bias"])):
        if bias is not None:
            parts[name] = parts[name] + bias.to(x.dtype)
    for name in parts:
        weight = p.get(f"{name.lower()}_rms_weight")
        if weight is not None:
            wide = parts[name].to(torch.promote_types(x.dtype, torch.float32))
            scale = (wide.square().mean(-1, keepdim=True) + p["b_c_dt_rms_eps"]).rsqrt()
            parts[name] = (wide * scale * weight).to(x.dtype)
    delta = F.linear(parts["dt"], p["delta_proj_weight"]).transpose(1, 2)
    B, C = (p[name] if name in p else parts[name].transpose(1, 2) for name in "BC")
    y, _ = scan(u, delta, p["A"], B, C, p["D"], z, p["delta_bias"], True)
    return F.linear(y.transpose(1, 2), p["out_proj_weight"], p["out_proj_bias"])


def check_inner(device: str, place: str, dtype: torch.dtype, constant: str, norms: bool) -> None:
    d, length = {"cpu": (32, 19), "interpreter": (16, 6), "cuda": (1536, 128)}[place]
    inputs = inner_inputs(d, length, dtype, constant, norms)
    exact = inner_reference(double(inputs))
    call = copies(inputs, torch.device(device))
    # On the same device: the library's float32 products over K = 1536 do not round alike on a GPU and a CPU.
    reference = inner_reference(call).cpu()
    memory = Memory(call)
    out = mamba_inner_fn(**call)
    memory.assert_unchanged_but()
    assert out.shape == (2, length, d // 2)
    assert_within_twice(out, reference, exact, approximate=0.25)


@pytest.mark.parametrize(
    ("dtype", "constant", "norms"),
    [
        (torch.float32, "", False),
        (torch.bfloat16, "", False),
        (torch.float32, "", True),
        (torch.float32, "B", False),
        (torch.float32, "C", False),
        (torch.bfloat16, "BC", False),
    ],
)
def test_inner(place: str, dtype: torch.dtype, constant: str, norms: bool) -> None:
    run_on(place, check_inner, place, dtype, constant, norms)


def test_inner_under_autocast() -> None:
    """Products in bfloat16, as mamba_ssm casts its weights; parameters stay in float32."""
    inputs = inner_inputs(16, 5, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**inputs)
    assert out.dtype == torch.bfloat16
    exact = inner_reference(double(inputs))
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_inner_of_nothing(shape: tuple[int, int]) -> None:
    inputs = inner_inputs(16, 5, torch.float32)
    inputs["xz"] = torch.zeros(shape[0], 32, shape[1])
    assert mamba_inner_fn(**inputs).shape == (*shape, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xz": torch.zeros(2, 30, 5)}, "xz has shape [2, 30, 5] but [B, 2 D, L] is [2, 32, 5]"),
        ({"xz": torch.zeros(32, 5)}, "xz has shape [32, 5]: expected [B, 2 D, L]"),
        ({"conv1d_weight": torch.zeros(16, 4)}, "conv1d_weight has shape [16, 4]: expected [D, 1, K]"),
        ({"conv1d_weight": torch.zeros(16, 1, 5)}, "a convolution width K of 5 but K must be 2 to 4"),
        (
            {"x_proj_weight": torch.zeros(20, 16)},
            "x_proj_weight has shape [20, 16] but [R + 2 N, D] is [21, 16]",
        ),
        ({"B": torch.zeros(16, N)}, "x_proj_weight has shape [21, 16] but [R + 2 N, D] is [13, 16]"),
        ({"out_proj_bias": torch.zeros(9)}, "out_proj_bias has shape [9] but [H] is [8]"),
        ({"dt_rms_weight": torch.zeros(4)}, "dt_rms_weight has shape [4] but [R] is [5]"),
        ({"A": torch.zeros(16, N) + 0j}, "A has dtype torch.complex64"),
        (
            {"x_proj_weight": torch.zeros(21, 16).bfloat16()},
            "x_proj_weight is torch.bfloat16 and xz torch.float32",
        ),
        ({"checkpoint_lvl": 2}, "checkpoint_lvl is 2: expected 0 or 1"),
        ({"cu_seqlens": starts_of([5])}, "cu_seqlens is not supported; pack the sequences along T"),
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx is not supported; pack the sequences along T"),
    ],
)
def test_inner_refuses(change: dict[str, Any], message: str) -> None:
    inputs = inner_inputs(16, 5, torch.float32)
    with pytest.raises(ValueError, match=r"^(mamba_inner_fn|causal_conv1d_fn): ") as refusal:
        mamba_inner_fn(**(inputs | change))
    assert message in str(refusal.value)


def plain_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: str) -> torch.Tensor:
    """What autograd sees through."""
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]))


def plain_scan(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    z: torch.Tensor, bias: torch.Tensor, _: bool,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What autograd sees through."""
    B, C = (x[..., None].expand(-1, -1, u.shape[2])[None] if x.dim() == 2 else x[:, None] for x in (B, C))
    dt, h, ys = F.softplus(delta + bias[:, None]), torch.zeros_like(A), []
    for t in range(u.shape[2]):
        h = torch.exp(dt[..., t, None] * A) * h + dt[..., t, None] * B[..., t] * u[..., t, None]
        ys.append((h * C[..., t]).sum(-1) + D * u[..., t])
    return torch.stack(ys, -1) * F.silu(z), None


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("constant", ["", "BC"])
def test_inner_gradients(constant: str, norms: bool) -> None:
    """Every gradient in float64, with and without computing again; and in float32 the same bits both ways."""
    inputs = inner_inputs(6, 19, torch.float64, constant, norms)
    wide = double(inputs)
    names = [name for name, x in wide.items() if isinstance(x, torch.Tensor)]
    if constant:
        wide |= {f"{name}_proj_bias": None for name in constant}
    if norms and constant:  # what x_proj does not give is not normed
        wide |= {"b_rms_weight": None, "c_rms_weight": None}
    names = [name for name in names if wide[name] is not None]

    def gradients(function: Any, given: dict[str, Any], **options: Any) -> list[torch.Tensor]:
        leaves = {name: given[name].detach().requires_grad_() for name in names}
        out = (
            function(given | leaves)
            if function is inner_reference
            else function(**(given | leaves), **options)
        )
        upstream = randn(*out.shape, seed=20).to(out.dtype)
        return list(torch.autograd.grad(out, list(leaves.values()), upstream))

    expected = gradients(lambda **p: inner_reference(p, plain_convolution, plain_scan), wide)
    for level in (0, 1):
        actual = gradients(mamba_inner_fn, wide, checkpoint_lvl=level)
        for name, grad, exact in zip(names, actual, expected, strict=True):
            scale = exact.abs().max().item()
            torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-10 * scale, msg=name)
    narrow = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in wide.items()}
    kept, again = (gradients(mamba_inner_fn, narrow, checkpoint_lvl=level) for level in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))


@pytest.mark.parametrize("form", ["constant", "per token", "two groups"])
def test_packed_scan(form: str) -> None:
    """``u [1, D, T]`` and ``cu_seqlens``: each sequence from zeros, the last state that of the last."""
    lengths = [4, 1, 7]
    inputs = scan_inputs(1, 12, 12, n=4, dtype=torch.float32, seed=21)
    shape = {"constant": (12, 4), "per token": (1, 4, 12), "two groups": (1, 2, 4, 12)}[form]
    inputs |= {"B": randn(*shape, seed=24), "C": randn(*shape, seed=25)}
    y, last = selective_scan_fn(**inputs, cu_seqlens=starts_of(lengths), return_last_state=True)
    at = 0
    for length in lengths:
        piece = {
            k: v[..., at : at + length] if isinstance(v, torch.Tensor) and v.dim() > 2 else v
            for k, v in inputs.items()
        }
        expected, state = selective_scan_fn(**piece, return_last_state=True)
        torch.testing.assert_close(y[..., at : at + length], expected)
        at += length
    torch.testing.assert_close(last, state)
    assert torch.equal(selective_scan_fn(**inputs, cu_seqlens=starts_of(lengths)), y)


def test_packed_scan_refuses() -> None:
    inputs = scan_inputs(2, 6, 5, n=4, dtype=torch.float32, seed=31)
    inputs |= {"B": randn(6, 4, seed=34), "C": randn(6, 4, seed=35), "cu_seqlens": starts_of([5])}
    for change, message in (
        ({}, r"u has shape \[2, 6, 5\]: expected \[1, D, T\] with cu_seqlens"),
        ({"prev_state": torch.zeros(2, 6, 4)}, "prev_state and cu_seqlens exclude each other"),
        ({"u": inputs["u"][:1]}, r"delta has shape \[2, 6, 5\] but \[1, D, T\] is \[1, 6, 5\]"),
    ):
        with pytest.raises(ValueError, match=rf"^selective_scan_fn: {message}"):
            selective_scan_fn(**(inputs | change))
