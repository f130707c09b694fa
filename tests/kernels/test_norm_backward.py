"""Gradients of RMSNorm, of RMSNorm with residual add, and of the split of x_proj's output."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conv_norm_testing import CPU, CUDA, INTERPRETER, run_on
from gradient_testing import assert_as_good_as, gradients, tensors
from kernel_testing import to

from tp_mamba.kernels.rms_norm import add_rms_norm, rms_norm
from tp_mamba.kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference
from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.kernels.split_dt_bc.reference import split_dt_bc_reference

EVERYWHERE = pytest.mark.parametrize("where", [CPU, INTERPRETER, CUDA])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    # Rows of very different size, as in a trained residual stream.
    scale = torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def norm_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, weight: torch.dtype | None, residual: torch.dtype | None
) -> dict[str, Any]:
    inputs: dict[str, Any] = {"x": randn(*shape, dtype=dtype)}
    if weight is not None:
        inputs["weight"] = 1 + torch.randn(shape[-1], generator=torch.Generator().manual_seed(1)).to(weight)
    if residual is not None:
        inputs["residual"] = randn(*shape, dtype=residual, seed=1)
    return inputs


def check_norms(device: str, dtype: torch.dtype) -> None:
    for shape in ((7, 16), (3, 5, 33), (1, 1), (70, 260)):
        for weight in (None, dtype, torch.float32):
            inputs = to(norm_inputs(shape, dtype, weight, None), torch.device(device))
            assert_as_good_as(rms_norm, rms_norm_reference, inputs)
    # Rows cut out of wider ones.
    inputs = to({"x": randn(9, 40, dtype=dtype)[:, 3:19]}, torch.device(device))
    assert_as_good_as(rms_norm, rms_norm_reference, inputs)


@EVERYWHERE
@DTYPES
def test_norms(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_norms, dtype)


def check_added_norms(device: str, dtype: torch.dtype) -> None:
    for shape, weight, residual, keep in (
        ((6, 33), dtype, torch.float32, True),
        ((6, 33), dtype, dtype, False),
        ((5, 64), torch.float32, torch.float32, False),
        ((2, 3, 64), None, None, True),
        ((2, 3, 64), dtype, None, False),
    ):
        inputs = to(norm_inputs(shape, dtype, weight, residual), torch.device(device))
        inputs.setdefault("weight", None)
        inputs.setdefault("residual", None)

        def of(function: Any, keep: bool = keep) -> Any:
            return partial(function, eps=EPS, residual_in_fp32=keep)

        assert_as_good_as(of(add_rms_norm), of(add_rms_norm_reference), inputs)


@EVERYWHERE
@DTYPES
def test_norms_with_residual_add(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_added_norms, dtype)


def split_inputs(R: int, N: int, dtype: torch.dtype, weights: str, slices: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(R + N)
    shape = (slices, 19, R + 2 * N) if slices else (19, R + 2 * N)
    inputs: dict[str, Any] = {"x": torch.randn(shape, generator=generator).to(dtype)}
    for letter in weights:
        name = {"d": "dt_weight", "b": "b_weight", "c": "c_weight"}[letter]
        inputs[name] = 1 + torch.randn(R if letter == "d" else N, generator=generator).to(dtype)
    return inputs


def check_split(device: str, dtype: torch.dtype) -> None:
    for R, N, weights, eps, slices in (
        (5, 3, "dbc", EPS, 0),
        (48, 16, "", EPS, 0),
        (48, 16, "dc", EPS, 3),
        (48, 16, "", None, 0),
        (5, 3, "", None, 2),
    ):
        inputs = to(
            split_inputs(R, N, torch.float32 if slices else dtype, weights, slices), torch.device(device)
        )

        def of(function: Any, R: int = R, N: int = N, eps: float | None = eps) -> Any:
            return partial(function, time_step_rank=R, state_size=N, eps=eps, dt_dtype=dtype)

        assert_as_good_as(of(split_dt_bc), of(split_dt_bc_reference), inputs)


@EVERYWHERE
@DTYPES
def test_split(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_split, dtype)


@torch.enable_grad()
def check_forward_bits(device: str) -> None:
    inputs = to(norm_inputs((6, 64), torch.bfloat16, torch.bfloat16, torch.float32), torch.device(device))
    split = to(split_inputs(48, 16, torch.bfloat16, "dbc"), torch.device(device))
    for function, given in (
        (add_rms_norm, inputs),
        (partial(split_dt_bc, time_step_rank=48, state_size=16, eps=EPS), split),
        (partial(split_dt_bc, time_step_rank=48, state_size=16), {"x": split["x"]}),
    ):
        tracked = function(**given | {"x": given["x"].detach().requires_grad_()})
        for each, plain in zip(tracked, function(**given), strict=True):
            assert each.requires_grad
            assert torch.equal(each, plain)
            assert each.stride() == plain.stride()


@EVERYWHERE
def test_the_forward_has_the_bits_of_inference(where: str) -> None:
    run_on(where, check_forward_bits)


def test_gradcheck() -> None:
    x, r = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(add_rms_norm, (x, r, weight))
    assert torch.autograd.gradcheck(lambda x: add_rms_norm(x, None, None), (x,))
    for slices in (0, 3):
        given = split_inputs(5, 3, torch.float64, "dbc", slices)
        leaves = [tensor.requires_grad_() for tensor in given.values()]

        def split(x: Any, dt: Any, b: Any, c: Any) -> Any:
            return split_dt_bc(x, 5, 3, dt_weight=dt, b_weight=b, c_weight=c, eps=EPS)

        assert torch.autograd.gradcheck(split, leaves)
        assert torch.autograd.gradcheck(lambda x: split_dt_bc(x, 5, 3), leaves[:1])


def test_only_one_result_is_used() -> None:
    """Of the norm and the sum: the gradient of the other is zero."""
    inputs = norm_inputs((6, 33), torch.bfloat16, torch.bfloat16, torch.float32)
    for used in (0, 1):

        def of(function: Any, used: int = used) -> Any:
            # (Twice, for a gradient of every input.)
            return lambda **inputs: function(**inputs)[used] + 0 * inputs["weight"].sum()

        assert_as_good_as(of(add_rms_norm), of(add_rms_norm_reference), inputs)


def test_a_float32_stream_is_all_that_is_kept() -> None:
    """Neither x nor the residual outlive the forward where their sum is written without rounding."""
    inputs = norm_inputs((6, 32), torch.bfloat16, None, torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, stream = add_rms_norm(inputs["x"].requires_grad_(), inputs["residual"], None)
    assert [each.data_ptr() for each in kept] == [stream.data_ptr()]


def test_opcheck() -> None:
    inputs = norm_inputs((3, 8), torch.bfloat16, torch.float32, torch.float32)
    x, weight, residual = (tensor.requires_grad_() for tensor in inputs.values())
    norm, added = torch.ops.tp_mamba.rms_norm.default, torch.ops.tp_mamba.add_rms_norm.default
    torch.library.opcheck(norm, (x, weight, EPS, torch.bfloat16))
    torch.library.opcheck(added, (x, residual, weight, EPS, torch.float32, torch.bfloat16))
    plain = (x.detach(), residual.detach(), weight.detach())
    for stored in (torch.float32, torch.bfloat16):
        backward = (plain[0], None, plain[1], None, plain[2], EPS, torch.bfloat16, stored)
        torch.library.opcheck(torch.ops.tp_mamba.rms_norm_backward.default, backward)
    split, split_backward = torch.ops.tp_mamba.split_dt_bc.default, torch.ops.tp_mamba.split_dt_bc_backward
    given = split_inputs(5, 3, torch.bfloat16, "dc")
    x, dt, c = (tensor.requires_grad_() for tensor in given.values())
    torch.library.opcheck(split, (x, 5, 3, dt, None, c, EPS, torch.bfloat16))
    torch.library.opcheck(split, (x, 5, 3, None, None, None, None, torch.bfloat16))
    ddt, dbc = torch.zeros(19, 5).bfloat16(), torch.zeros(19, 6)
    plain = (ddt, dbc, x.detach(), dt.detach(), None, c.detach(), EPS, torch.bfloat16)
    torch.library.opcheck(split_backward.default, plain)


def test_compiles_with_its_backward() -> None:
    inputs = norm_inputs((6, 32), torch.float32, torch.float32, torch.float32)
    names = tensors(inputs)
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    expected, found = gradients(add_rms_norm, inputs, names), gradients(compiled, inputs, names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name])
