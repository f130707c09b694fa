"""The choice of a routine for ``x @ weight.T``: same values as torch's linear layer, whichever serves."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import assert_within_twice

from tp_mamba.kernels import linear as linear_module
from tp_mamba.kernels.linear import cpu, linear, linear_partial, prefers_skinny, prefers_slices, skinny_linear
from tp_mamba.kernels.linear.launch import slice_count
from tp_mamba.kernels.linear.reference import add_slices


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a test's size go where large ones do."""
    monkeypatch.setattr(cpu, "LARGE", 0)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own linear layer may not be used: the call is to be served otherwise."""

    def fail(*_: object) -> torch.Tensor:
        raise AssertionError("torch.nn.functional.linear was called")

    monkeypatch.setattr(linear_module.F, "linear", fail)


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [480, 250, 375])
@pytest.mark.parametrize("rows", [(1,), (), (2,), (2, 1), (3,), (2, 5), (70,)])
@pytest.mark.parametrize("columns", [96, 1536])
def test_errs_no_more_than_twice_the_library(
    rows: tuple[int, ...], out: int, bias: bool, columns: int
) -> None:
    """Rows by twos and by many, whole blocks of the weight and an odd number of its rows, x of any rank."""
    x, weight = make(*rows, columns), make(out, columns)
    b = make(out) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    actual = linear(x, weight, b)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    assert_within_twice(actual, F.linear(x, weight, b), exact)
    assert torch.equal(linear(x, weight, b), actual)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_or_two_rows_are_served_by_blocks(rows: int, refused: None) -> None:
    x, weight = make(rows, 64), make(32, 64)
    torch.testing.assert_close(linear(x, weight), x @ weight.t())  # in grad mode, with nothing to track
    with torch.no_grad():
        linear(x.requires_grad_(), weight.requires_grad_())


@pytest.mark.parametrize("rows", [(3,), (2, 2), (9,)])
def test_more_rows_are_the_librarys_own(rows: tuple[int, ...]) -> None:
    x, weight, b = make(*rows, 1536), make(32, 1536), make(32)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x, weight, b), F.linear(x, weight, b))


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("of", ["x", "weight", "bias"])
def test_gradients_are_those_of_torchs_linear(of: str, rows: int) -> None:
    given = {"x": make(rows, 64), "weight": make(32, 64), "bias": make(32)}
    grads = []
    for function in (linear, F.linear):
        tensors = {name: tensor.clone().requires_grad_(name == of) for name, tensor in given.items()}
        function(*tensors.values()).square().sum().backward()
        grads.append(tensors[of].grad)
    assert grads[0] is not None
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_own(dtype: torch.dtype) -> None:
    x, weight = make(1, 64).to(dtype), make(32, 64).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_cpu_takes_no_kernel_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_skinny_linear", None)  # any use of it fails
    x, weight = make(3, 2048).bfloat16(), make(24, 2048).bfloat16()
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_strided_operands(rows: int) -> None:
    """x cut out of wider rows and with gaps between its columns, a weight with gaps that lies transposed."""
    weight, transposed = make(32, 64), make(64, 64)[:, ::2]
    for x in (make(9, 128)[:rows, 32:96], make(9, 128)[:rows, ::2]):
        torch.testing.assert_close(linear(x, weight), x.contiguous() @ weight.t())
        torch.testing.assert_close(linear(x, transposed.mT), x.contiguous() @ transposed.contiguous())


def test_no_rows_and_no_columns() -> None:
    assert linear(make(0, 64), make(32, 64)).shape == (0, 32)
    assert torch.equal(linear(make(3, 0), make(32, 0)), torch.zeros(3, 32))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((1, 63), (32, 64), None), ((9, 63), (32, 64), None), ((1, 64), (32, 64), 31), ((9, 64), (32, 64), 31)],
)
def test_errors_are_torchs_own(x: tuple[int, int], weight: tuple[int, int], bias: int | None) -> None:
    with pytest.raises(RuntimeError):
        linear(make(*x), make(*weight), None if bias is None else make(bias))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(make(1, 64), make(32, 64).double())


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_compiles_without_a_graph_break(rows: int) -> None:
    x, weight = make(rows, 64), make(32, 64)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), linear(x, weight))


def test_compiles_with_inductor_on_a_cpu() -> None:
    """Inductor refuses operators that are torch's own business."""
    x, weight, b = make(9, 64), make(32, 64), make(32)
    compiled = torch.compile(linear, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, b), linear(x, weight, b))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a call on a GPU would take, noted; it is computed here."""
    names: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args: names.append(name) or function(*args)

    for name, value in (("is_cuda", True), ("is_cpu", False)):
        monkeypatch.setattr(torch.Tensor, name, value)
    monkeypatch.setattr(linear_module, "use_triton", lambda x: False)
    for name in ("_skinny_linear", "_skinny_linear_slices"):
        monkeypatch.setattr(linear_module, name, noted(name.lstrip("_"), getattr(linear_module, name)))
    monkeypatch.setattr(linear_module.F, "linear", noted("linear", F.linear))
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 0, 3), (2, 3, 5), (128,), (129,)])
def test_a_gpu_takes_the_kernel_for_few_rows(
    rows: tuple[int, ...], dtype: torch.dtype, called: list[str]
) -> None:
    """Where that is preferred, of x of any rank and any strides: always the shape that torch gives."""
    x, weight = make(*rows, 2048).to(dtype), (make(24, 2048) / 45).to(dtype)
    exact = F.linear(x.double(), weight.double())
    kernel = prefers_skinny(x.numel() // 2048, 24, 2048, dtype)
    assert kernel == (x.numel() // 2048 in range(1, 129))
    for each in (x, make(*rows, 4096).to(dtype)[..., 5:2053].copy_(x), x.mT.contiguous().mT if rows else x):
        called.clear()
        y = linear(each, weight)
        assert called[0] == ("skinny_linear" if kernel else "linear")
        assert y.shape == exact.shape
        assert y.dtype == dtype
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"columns": 1024},
        {"bias": True},
        {"transposed": True},
    ],
    ids=str,
)
def test_a_gpu_takes_the_librarys_product_otherwise(changes: dict[str, Any], called: list[str]) -> None:
    dtype, columns = changes.get("dtype", torch.bfloat16), changes.get("columns", 2048)
    x, weight, bias = (tensor.to(dtype) for tensor in (make(3, columns), make(24, columns), make(24)))
    weight = weight.t().contiguous().t() if "transposed" in changes else weight
    expected = torch.nn.functional.linear(x, weight, bias if "bias" in changes else None)
    called.clear()
    y = linear(x, weight, bias if "bias" in changes else None)
    assert called == ["linear"]
    assert torch.equal(y, expected)


def test_frozen_weights_and_no_grad_take_the_kernel_on_a_gpu(called: list[str]) -> None:
    x, weight = make(3, 2048).bfloat16().requires_grad_(), make(24, 2048).bfloat16().requires_grad_()
    with torch.no_grad():
        linear(x, weight)
    linear(x.detach(), weight.detach())
    assert called.count("skinny_linear") == 2


@pytest.mark.parametrize("tracked", ["x", "weight"])
def test_the_kernels_registered_operator_is_taken_where_there_is_a_gradient(
    tracked: str, called: list[str]
) -> None:
    inputs = {"x": make(3, 2048).bfloat16(), "weight": make(24, 2048).bfloat16()}
    inputs[tracked].requires_grad_()
    assert operator_of(linear(**inputs)) == "skinny_linear"
    assert operator_of(linear_partial(**inputs, in_float32=True)) == "skinny_linear"
    assert operator_of(linear_partial(**inputs, in_float32=True, in_slices=True)) == "skinny_linear_slices"


def operator_of(y: torch.Tensor) -> str:
    """The name of the registered operator that gave ``y``."""
    assert y.grad_fn is not None
    (name,) = re.findall(r"tp_mamba_(\w+)_default", f"{y.grad_fn.name()} {y.grad_fn.next_functions}")
    return name


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((4, 2048), (24, 4096), "shapes"),
        ((3, 2048), (4, 24, 2048), "<= 2"),
        ((3, 0), (24, 2048), "shapes"),
    ],
)
def test_errors_are_torchs_own_on_a_gpu(
    x: tuple[int, ...], weight: tuple[int, ...], message: str, called: list[str]
) -> None:
    with pytest.raises(RuntimeError, match=message):
        linear(make(*x).bfloat16(), make(*weight).bfloat16())
    assert called == ["linear"]
    with pytest.raises(RuntimeError, match="dtype"):
        linear(make(3, 2048).half(), make(24, 2048).bfloat16())


@pytest.mark.parametrize("shape", [(3, 2048), (128, 2048), (2, 3, 2048), (129, 2048), (3, 1024), (0, 2048)])
@pytest.mark.parametrize("in_slices", [False, True])
def test_a_term_in_float32(
    shape: tuple[int, ...], in_slices: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished, of x of any rank; or in slices where the product is preferred and x is ``[M, k]``."""
    monkeypatch.setattr(torch, "mm", lambda x, w, *, out_dtype: x.to(out_dtype) @ w.to(out_dtype))
    x, weight = make(*shape).bfloat16(), (make(24, shape[-1]) / 45).bfloat16()
    y = linear_partial(x, weight, in_float32=True, in_slices=in_slices)
    sliced = in_slices and len(shape) == 2 and prefers_slices(shape[0], 24, shape[-1], x.dtype)
    assert ("skinny_linear_slices" in called) == sliced
    assert y.dtype == torch.float32
    assert y.shape == (*[slice_count(24, shape[-1])] * sliced, *shape[:-1], 24)
    exact = F.linear(x.double(), weight.double())
    torch.testing.assert_close((add_slices(y) if sliced else y).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_term_in_the_dtype_of_x(called: list[str]) -> None:
    x, weight = make(3, 2048).bfloat16(), make(24, 2048).bfloat16()
    assert torch.equal(linear_partial(x, weight, in_slices=True), linear(x, weight))
    assert called.count("skinny_linear") == 2
    called.clear()
    assert linear_partial(x.float(), weight.float(), in_float32=True, in_slices=True).shape == (3, 24)
    assert called == ["linear"]


def test_a_term_of_many_rows_with_a_gradient(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", lambda x, w, *, out_dtype: x.to(out_dtype) @ w.to(out_dtype))
    x, weight = make(129, 2048).bfloat16(), make(24, 2048).bfloat16().requires_grad_()
    y = linear_partial(x, weight, in_float32=True, in_slices=True)
    assert (y.shape, y.dtype, operator_of(y)) == ((129, 24), torch.float32, "linear_float32")


def test_the_choice_compiles_without_a_graph_break() -> None:
    """The number of SMs, by which products are chosen, is a constant to a compiler."""

    def prefers(x: torch.Tensor) -> torch.Tensor:
        return x + linear_module._takes_slices(x, weight)

    x, weight = make(3, 2048).bfloat16(), make(24, 2048).bfloat16()
    assert torch.equal(torch.compile(prefers, backend="eager", fullgraph=True)(x), x + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(1,), (2, 4), (128,), (129,)])
def test_compiles_without_a_graph_break_on_a_gpu(rows: tuple[int, ...]) -> None:
    x, weight = (tensor.bfloat16().cuda() for tensor in (make(*rows, 2048), make(24, 2048)))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), linear(x, weight))
    if rows != (129,):
        assert torch.equal(linear(x, weight).view(-1, 24), skinny_linear(x.view(-1, 2048), weight))
