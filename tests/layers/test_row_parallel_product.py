"""Which product a row-parallel layer takes on a GPU, and when it leaves sums over slices to the next kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from skinny_linear_testing import assert_float32_sums

from tp_mamba.kernels import linear as linear_module
from tp_mamba.kernels.linear.launch import slice_count
from tp_mamba.kernels.linear.reference import add_slices
from tp_mamba.layers.linear import RowParallelLinear
from tp_mamba.parallel.group import TensorParallel


class Products:
    """What a layer on a GPU would call, noted and computed here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[str] = []
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr("tp_mamba.kernels.linear.use_triton", lambda x: False)
        monkeypatch.setattr(torch, "mm", self.mm)
        for module, name in (
            (linear_module, "_skinny_linear"),
            (linear_module, "_skinny_linear_slices"),
            (F, "linear"),
        ):
            monkeypatch.setattr(module, name, self.noted(name.lstrip("_"), getattr(module, name)))

    def noted(self, name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.called.append(name)
            return function(*args, **kwargs)

        return call

    def mm(self, x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        self.called.append("mm")
        return x.to(out_dtype) @ weight.to(out_dtype)


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        ((3, 2048), {}, "skinny_linear"),
        ((4, 16, 2048), {}, "skinny_linear"),
        ((2048,), {}, "skinny_linear"),
        ((65, 2048), {}, "skinny_linear"),
        ((129, 2048), {}, "linear"),
        ((0, 2048), {}, "linear"),
        ((3, 2048), {"dtype": torch.float16}, "skinny_linear"),
        ((3, 2048), {"dtype": torch.float32}, "linear"),
        ((3, 2048), {"x_grad": True}, None),  # the registered operator, which has a backward
        ((3, 2048), {"weight_grad": True}, None),
        ((3, 2048), {"weight_grad": True, "no_grad": True}, "skinny_linear"),
        ((3, 2048), {"bias": True}, "skinny_linear"),
        ((3, 2048), {"bias": True, "wide": True}, "skinny_linear"),
        ((3, 2048), {"wide": True}, "skinny_linear"),
        ((65, 2048), {"wide": True}, "skinny_linear"),
        ((129, 2048), {"wide": True}, "mm"),
        ((3, 2048), {"wide": True, "x_grad": True}, None),
        ((3, 1024), {}, "linear"),
        ((3, 1024), {"wide": True}, "mm"),
    ],
)
def test_a_row_parallel_layer_takes_the_faster_product(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], changes: dict[str, Any], expected: str
) -> None:
    dtype, bias, wide = changes.get("dtype", torch.bfloat16), changes.get("bias", False), "wide" in changes
    torch.manual_seed(0)
    layer = RowParallelLinear(shape[-1], 24, bias=bias, reduce_in_float32=wide, dtype=dtype)
    layer.requires_grad_("weight_grad" in changes)
    x = torch.randn(shape).to(dtype).requires_grad_("x_grad" in changes)
    exact = torch.nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    products = Products(monkeypatch)
    with torch.set_grad_enabled("no_grad" not in changes):
        y = layer(x)
    monkeypatch.undo()
    if expected is None:
        assert y.grad_fn is not None
        assert "skinny_linear" in y.grad_fn.name()
    else:  # what is computed here in its place may call others
        assert products.called[:1] == [expected]
    assert y.dtype == (torch.float32 if wide else dtype)
    assert y.requires_grad == (expected is None)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2 * torch.finfo(y.dtype).eps * 4)


def row_parallel(size: int = 2048, dtype: torch.dtype = torch.bfloat16, **options: Any) -> RowParallelLinear:
    torch.manual_seed(0)
    options = {"bias": False, "reduce_in_float32": True, "tp": TensorParallel(device="cpu")} | options
    return RowParallelLinear(size, 24, dtype=dtype, **options).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 5, 128])
def test_a_row_parallel_layer_gives_slices(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    layer, x = row_parallel(), torch.randn(rows, 2048).bfloat16()
    products = Products(monkeypatch)
    partial = layer.partial(x, slices=True)
    monkeypatch.undo()
    assert partial.sliced
    slices = partial.value
    assert products.called[0] == "skinny_linear_slices"
    assert slices.shape == (slice_count(24, 2048), rows, 24)
    assert slices.dtype == torch.float32
    assert_float32_sums(add_slices(slices), x.double() @ layer.weight.double().t(), layer.weight)
    assert torch.equal(partial.sum(), add_slices(slices))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((0, 2048), {}),
        ((129, 2048), {}),
        ((2048,), {}),
        ((1, 3, 2048), {}),
        ((3, 1024), {}),
        ((3, 2048), {"bias": True}),
        ((3, 2048), {"reduce_in_float32": False}),
        ((3, 2048), {"dtype": torch.float32}),
        ((3, 2048), {"ranks": 2}),
        ((3, 2048), {"on": "cpu"}),
    ],
)
def test_a_row_parallel_layer_gives_no_slices_of(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    """What it gives then is the whole product, over all ranks, and the bias."""
    kept = {
        name: value for name, value in options.items() if name in RowParallelLinear.__init__.__kwdefaults__
    }
    kept |= {name: options[name] for name in ("bias",) if name in options}
    layer, ranks = row_parallel(shape[-1], **kept), options.get("ranks", 1)
    x = torch.randn(shape).to(layer.weight.dtype)
    exact = ranks * F.linear(x.double(), layer.weight.double())
    products = Products(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", options.get("on") != "cpu")
    monkeypatch.setattr(layer.tp, "size", ranks)
    monkeypatch.setattr(layer.tp, "all_reduce_", lambda y: y.mul_(ranks))  # all ranks hold the same
    partial = layer.partial(x, slices=True)
    y = partial.sum()
    monkeypatch.undo()
    assert not partial.sliced
    assert "skinny_linear_slices" not in products.called
    if "bias" in options:
        exact += layer.bias.double()
    eps = torch.finfo(torch.bfloat16 if "reduce_in_float32" in options else torch.float32).eps
    torch.testing.assert_close(y.double(), exact, rtol=eps, atol=32 * eps)


def test_a_row_parallel_layer_still_refuses_mixed_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = RowParallelLinear(2048, 24, bias=False, dtype=torch.float16).requires_grad_(False)
    products = Products(monkeypatch)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.zeros(3, 2048).bfloat16())
    assert products.called == ["linear"]
