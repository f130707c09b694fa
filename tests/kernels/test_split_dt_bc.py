"""dt, B and C cut out of x_proj's output: the Triton kernel (interpreted, and on a GPU) and the CPU path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_norm_testing import CPU, CUDA, INTERPRETER, assert_as_good, run_on
from kernel_testing import assert_within_twice, double, to
from poisoning import poisoned_memory
from split_dt_bc_testing import EPS, in_slices, make

from tp_mamba.kernels.linear.reference import add_slices
from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.kernels.split_dt_bc.reference import split_dt_bc_reference

EVERYWHERE = [CPU, INTERPRETER, CUDA]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    (1, 256, 16),
    (7, 48, 16),
    (50, 256, 16),
    (40, 512, 16),
    (37, 33, 5),
    (150, 10, 3),
    (30, 6, 256),
    (60, 1, 1),
]
"""T, R, N: published models' and odd ones, with fewer and more tokens than a program takes."""


def check(inputs: dict[str, Any], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dt, B and C as good as the reference in their dtypes; without norms, to the bit."""
    exact = split_dt_bc_reference(**double(inputs) | {"dt_dtype": torch.float64})
    reference = split_dt_bc_reference(**inputs)
    with poisoned_memory():
        actual = split_dt_bc(**to(inputs, torch.device(device)))
    for got, rounded, right in zip(actual, reference, exact, strict=True):
        assert got.dtype == rounded.dtype
        if inputs.get("eps") is None:
            assert torch.equal(got.cpu(), rounded)
        elif got.shape[0] >= 30:
            assert_within_twice(got, rounded, right)
        else:  # one rounding of a row's scale is an error of the whole row: few rows are a matter of luck
            assert_as_good(got.cpu(), right, rounded)
    return actual


def check_sizes(device: str, dtype: torch.dtype) -> None:
    for T, R, N in SIZES:
        for eps in (None, EPS):
            for dt_dtype in (None, torch.bfloat16, torch.float32):
                dt, B, C = check(make(T, R, N, dtype) | {"eps": eps, "dt_dtype": dt_dtype}, device)
                if eps is not None:
                    assert dt.is_contiguous()
                    assert B.stride() == C.stride() == (2 * N, 1)
                    assert C.data_ptr() == B.data_ptr() + 4 * N


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_as_good_as_its_dtype(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_sizes, dtype)


def check_weights(device: str) -> None:
    for absent in ("", "dt_weight", "b_weight", "c_weight"):
        for T, R, N in SIZES[2:5]:
            inputs = make(T, R, N, weighted=True) | {"eps": EPS, "dt_dtype": torch.bfloat16}
            check({name: value for name, value in inputs.items() if name != absent}, device)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_weights(where: str) -> None:
    run_on(where, check_weights)


def check_strides(device: str) -> None:
    wide = make(80, 50, 7)["x"]
    for x in (wide[::2, 3:40], wide[:40, :37], wide.t().contiguous().t()[:40, 1:38], wide[:1, 5:42]):
        for eps in (None, EPS):
            check(
                {"x": x, "time_step_rank": 27, "state_size": 5, "eps": eps, "dt_dtype": torch.float16}, device
            )


@pytest.mark.parametrize("where", EVERYWHERE)
def test_any_strides(where: str) -> None:
    run_on(where, check_strides)


def check_no_tokens(device: str) -> None:
    for eps in (None, EPS):
        for shape in ((0, 14), (3, 0, 14)):
            x = torch.empty(shape, device=device)
            dt, B, C = split_dt_bc(x, 4, 5, eps=eps, dt_dtype=torch.bfloat16)
            assert (dt.shape, B.shape, C.shape) == ((0, 4), (0, 5), (0, 5))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_no_tokens(where: str) -> None:
    run_on(where, check_no_tokens)


def check_slices(device: str) -> None:
    """As good as the reference, and to the bit the call of the added slices."""
    for T, R, N, count in [
        (31, 256, 16, 16),
        (30, 48, 16, 1),
        (30, 48, 16, 2),
        (40, 33, 5, 5),
        (9, 128, 16, 6),
    ]:
        for eps in (None, EPS):
            for dt_dtype in (torch.bfloat16, torch.float32):
                inputs = make(T, R, N, weighted=eps is not None) | {"eps": eps, "dt_dtype": dt_dtype}
                inputs = in_slices(inputs, count)
                actual = check(inputs, device)
                added = split_dt_bc(**to(inputs | {"x": add_slices(inputs["x"])}, torch.device(device)))
                for got, right in zip(actual, added, strict=True):
                    assert torch.equal(got, right), (T, R, N, count, eps)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_slices_are_added_first(where: str) -> None:
    run_on(where, check_slices)


def check_tree(device: str) -> None:
    """``2^25 + 1`` is ``2^25`` in float32: one slice after the other would end in 1, pairs of another distance in 4."""
    slices = torch.tensor([2.0**25, 1.0, -(2.0**25), 1.0, 2.0**25, 1.0, -(2.0**25), 1.0, 3.0], device=device)
    for count, total in ((8, 0.0), (9, 3.0)):
        for part in split_dt_bc(slices[:count, None, None].expand(count, 3, 14), 4, 5):
            assert torch.equal(part.cpu(), torch.full(part.shape, total))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_slices_are_added_in_a_binary_tree(where: str) -> None:
    run_on(where, check_tree)


def check_slices_of_any_strides(device: str) -> None:
    plain = in_slices(make(30, 27, 5) | {"eps": EPS}, 3)
    expected = check(plain, device)
    wide = torch.zeros(6, 60, 50)
    wide[::2, ::2, 5:42] = plain["x"]
    for x in (
        wide[::2, ::2, 5:42],
        plain["x"].mT.contiguous().mT,
        plain["x"].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        actual = check(plain | {"x": x}, device)
        assert all(torch.equal(got, right) for got, right in zip(actual, expected, strict=True))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_slices_of_any_strides(where: str) -> None:
    run_on(where, check_slices_of_any_strides)


def check_rows_of_slices_alone(device: str) -> None:
    inputs = in_slices(make(19, 48, 16, weighted=True) | {"eps": EPS}, 6)
    inputs = to(inputs, torch.device(device))
    whole = split_dt_bc(**inputs)
    for row in (0, 7, 18):
        alone = split_dt_bc(**inputs | {"x": inputs["x"][:, row : row + 1]})
        for one, all_rows in zip(alone, whole, strict=True):
            assert torch.equal(one[0], all_rows[row])


@pytest.mark.parametrize("where", [INTERPRETER, CUDA])
def test_row_of_slices_does_not_depend_on_its_batch(where: str) -> None:
    run_on(where, check_rows_of_slices_alone)


def check_rows_alone(device: str) -> None:
    for R, N in ((48, 16), (300, 5)):
        inputs = to(make(67, R, N, torch.bfloat16, weighted=True) | {"eps": EPS}, torch.device(device))
        whole = split_dt_bc(**inputs)
        for row in (0, 31, 66):
            alone = split_dt_bc(**inputs | {"x": inputs["x"][row : row + 1]})
            for one, all_rows in zip(alone, whole, strict=True):
                assert torch.equal(one[0], all_rows[row])


@pytest.mark.parametrize("where", [INTERPRETER, CUDA])
def test_row_does_not_depend_on_its_batch(where: str) -> None:
    run_on(where, check_rows_alone)


def check_far_rows(device: str) -> None:
    """Row addresses are 64-bit: the third row begins at element 2^31; the memory in between is never touched."""
    x = torch.empty(2**31 + 14, dtype=torch.float16, device=device).as_strided((3, 14), (2**30, 1))
    x.copy_(torch.arange(42).view(3, 14))
    for got, right in zip(split_dt_bc(x, 4, 5), split_dt_bc_reference(x, 4, 5), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("where", [INTERPRETER, CUDA])
def test_more_than_2_31_elements(where: str) -> None:
    run_on(where, check_far_rows)


def check_no_views(device: str) -> None:
    for x in (torch.randn(3, 14, device=device), torch.randn(1, 3, 14, device=device)):
        for part in split_dt_bc(x, 4, 5):
            assert part.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("where", [INTERPRETER, CUDA])
def test_the_kernel_never_returns_views(where: str) -> None:
    run_on(where, check_no_views)


def test_float64() -> None:
    plain = double(make(4, 9, 3, weighted=True)) | {"eps": EPS}
    for inputs in (plain, in_slices(plain, 5)):
        for got, exact in zip(split_dt_bc(**inputs), split_dt_bc_reference(**inputs), strict=True):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, exact, rtol=1e-13, atol=0)


def test_on_a_cpu_float32_is_not_copied() -> None:
    """And only there, where nothing is to be computed: in every other case the results share no memory with x."""
    x = torch.randn(3, 14)
    for part, start in zip(split_dt_bc(x, 4, 5), (0, 4, 9), strict=True):
        assert part.data_ptr() == x[:, start:].data_ptr()
    storage = x.untyped_storage().data_ptr()
    for of, options in ((x, {"eps": EPS}), (x, {"dt_dtype": torch.bfloat16}), (x[None], {})):
        for part in split_dt_bc(of, 4, 5, **options):
            assert part.untyped_storage().data_ptr() != storage


def test_compiled_and_opcheck() -> None:
    inputs = make(3, 8, 4, weighted=True)
    weights = [inputs[name] for name in ("dt_weight", "b_weight", "c_weight")]
    for arguments in ((*weights, EPS, torch.bfloat16), (None, None, None, None, torch.float32)):
        for x in (inputs["x"], in_slices(inputs, 5)["x"]):
            torch.library.opcheck(torch.ops.tp_mamba.split_dt_bc.default, (x, 8, 4, *arguments))
    for options in ({"eps": EPS}, {}, {"dt_dtype": torch.bfloat16}):

        def total(x: torch.Tensor, options: dict[str, Any] = options) -> torch.Tensor:
            dt, B, C = split_dt_bc(x, 8, 4, **options)
            return dt.float().sum(-1) + (B * C).sum(-1)

        compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
        for x in (inputs["x"], in_slices(inputs, 5)["x"]):
            torch.testing.assert_close(compiled(x), total(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, "x has shape [16] but must be [T, R + 2 N] = [T, 16]"),
        ({"x": torch.zeros(4, 2, 15)}, "x has shape [4, 2, 15] but must be"),
        ({"x": torch.zeros(0, 2, 16)}, "slices to be added up must be at least one"),
        ({"x": torch.zeros(3, 2, 16).half()}, "slices to be added up must be at least one, in float32"),
        ({"x": torch.zeros(2, 15)}, "x has shape [2, 15] but must be"),
        ({"x": torch.zeros(2, 16, dtype=torch.int32)}, "dt_dtype is torch.int32"),
        ({"x": torch.zeros(2, 16, dtype=torch.int32), "dt_dtype": torch.float32}, "x has dtype torch.int32"),
        ({"time_step_rank": 0}, "time_step_rank is 0 but must be at least 1"),
        ({"state_size": 0}, "state_size is 0 but must be 1 to 256"),
        ({"state_size": 257}, "state_size is 257 but must be 1 to 256"),
        ({"dt_weight": torch.zeros(7)}, "dt_weight has shape [7] but [R] is [8]"),
        ({"b_weight": torch.zeros(8)}, "b_weight has shape [8] but [N] is [4]"),
        ({"c_weight": torch.zeros(1, 4)}, "c_weight has shape [1, 4] but [N] is [4]"),
        ({"c_weight": torch.zeros(4, device="meta")}, "c_weight is on meta but x is on cpu"),
        ({"c_weight": torch.zeros(4, dtype=torch.int64)}, "c_weight has dtype torch.int64"),
        ({"dt_dtype": torch.int8}, "dt_dtype is torch.int8"),
        ({"eps": None, "b_weight": torch.zeros(4)}, "b_weight is given but eps is None"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    inputs = make(2, 8, 4) | {"eps": EPS} | change
    with pytest.raises(ValueError, match=r"^split_dt_bc: ") as refusal:
        split_dt_bc(**inputs)
    assert message in str(refusal.value)
