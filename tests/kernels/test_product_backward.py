"""Gradients of the products: of few rows, in slices, in float32, and under a softplus."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_testing import assert_as_good_as, gradients, tensors
from kernel_testing import DEVICES, TIME_STEPS, to, triton_device

from tp_mamba.kernels.linear import linear_partial, skinny_linear, skinny_linear_slices
from tp_mamba.kernels.linear.cpu import add_slices_cpu
from tp_mamba.kernels.linear.reference import linear_reference
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.linear_softplus.reference import linear_softplus_reference


@pytest.fixture(params=["cpu", *DEVICES])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return torch.device("cpu") if request.param == "cpu" else triton_device(request.param, monkeypatch)


def make(T: int, D: int, R: int, dtype: torch.dtype, bias: torch.dtype | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(T + D + R)
    inputs = {
        "x": torch.randn(T, R + 3, generator=generator).to(dtype)[:, :R],
        "weight": (torch.randn(D, R, generator=generator) / R**0.5).to(dtype),
    }
    if bias is not None:  # to where softplus can go wrong
        steps = torch.tensor(TIME_STEPS).repeat(D // len(TIME_STEPS) + 1)[:D]
        inputs["bias"] = steps.to(bias)
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "D", "R"), [(1, 40, 8), (19, 40, 6), (70, 33, 48), (65, 130, 16)])
def test_softplus(T: int, D: int, R: int, dtype: torch.dtype, device: torch.device) -> None:
    for bias in (None, torch.float32, dtype):
        inputs = to(make(T, D, R, dtype, bias), device)
        assert_as_good_as(linear_softplus, linear_softplus_reference, inputs)


def test_softplus_of_more_channels_than_a_rank_holds(device: torch.device) -> None:
    """R above 256, in pieces; and nothing at all."""
    assert_as_good_as(
        linear_softplus, linear_softplus_reference, to(make(5, 9, 300, torch.bfloat16, torch.float32), device)
    )
    for T, D in ((0, 9), (5, 0)):
        inputs = to(make(T, D, 4, torch.float32, torch.float32), device)
        for gradient in gradients(linear_softplus, inputs, tensors(inputs)).values():
            assert (gradient == 0).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_few_rows(out_dtype: torch.dtype, device: torch.device) -> None:
    def of(function: Any) -> Any:
        return lambda **inputs: function(**inputs, out_dtype=out_dtype)

    inputs = to(make(7, 24, 700, torch.bfloat16), device)
    assert_as_good_as(of(skinny_linear), of(linear_reference), inputs)


@pytest.mark.parametrize("k", [40, 700, 5000])
def test_slices(k: int, device: torch.device) -> None:
    def in_slices(**inputs: Any) -> torch.Tensor:
        return add_slices_cpu(skinny_linear_slices(**inputs))

    def whole(**inputs: Any) -> torch.Tensor:
        return linear_reference(
            **inputs, out_dtype=max(torch.float32, inputs["x"].dtype, key=lambda d: d.itemsize)
        )

    assert_as_good_as(in_slices, whole, to(make(7, 6, k, torch.bfloat16), device))


@pytest.mark.parametrize("rows", [3, 200])
def test_a_term_in_float32(rows: int, device: torch.device) -> None:
    def term(**inputs: Any) -> torch.Tensor:
        return linear_partial(**inputs, in_float32=True)

    def whole(**inputs: Any) -> torch.Tensor:
        return linear_reference(
            **inputs, out_dtype=max(torch.float32, inputs["x"].dtype, key=lambda d: d.itemsize)
        )

    inputs = to(make(rows, 24, 2048, torch.bfloat16), device)
    assert_as_good_as(term, whole, inputs)
    inputs["x"] = inputs["x"].detach().requires_grad_()
    tracked = term(**inputs)
    assert tracked.requires_grad
    with torch.no_grad():
        assert torch.equal(term(**inputs), tracked)


def test_the_forward_has_the_bits_of_inference(device: torch.device) -> None:
    inputs = to(make(70, 33, 48, torch.bfloat16, torch.float32), device)
    expected = linear_softplus(**inputs)
    tracked = linear_softplus(**inputs | {"x": inputs["x"].detach().requires_grad_()})
    assert tracked.requires_grad
    assert torch.equal(tracked, expected)


def test_gradcheck() -> None:
    for bias in (None, torch.float64):
        inputs = make(5, 9, 3, torch.float64, bias)
        assert torch.autograd.gradcheck(linear_softplus, [x.requires_grad_() for x in inputs.values()])


def test_opcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in make(3, 6, 40, torch.bfloat16, torch.float32).values())
    operators = torch.ops.tp_mamba
    torch.library.opcheck(operators.linear_softplus.default, (x, weight, bias))
    torch.library.opcheck(operators.linear_float32.default, (x, weight))
    torch.library.opcheck(operators.skinny_linear.default, (x, weight, torch.float32))
    torch.library.opcheck(operators.skinny_linear_slices.default, (x, weight))
    dout = torch.zeros(3, 6).bfloat16()
    for given in (bias.detach(), None):
        arguments = (dout, x.detach(), weight.detach(), given, torch.float32)
        torch.library.opcheck(operators.linear_softplus_backward.default, arguments)


def test_compiles_with_its_backward() -> None:
    inputs = make(3, 6, 4, torch.float32, torch.float32)
    names = tensors(inputs)
    compiled = torch.compile(linear_softplus, fullgraph=True, backend="aot_eager")
    expected, found = gradients(linear_softplus, inputs, names), gradients(compiled, inputs, names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name])
