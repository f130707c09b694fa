"""x @ weight.T for few rows: the Triton kernels (interpreted, and on a GPU) and the CPU path against float64."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_testing import (
    DEVICES,
    Launches,
    assert_within_twice,
    compile_as_launched,
    double,
    poisoned_like,
    specialization,
    stack_bytes,
    to,
    triton_device,
)
from ptx_testing import read_ahead
from triton_interpreter import repair

from tp_mamba.kernels import linear as linear_module
from tp_mamba.kernels.linear.launch import (
    SkinnyLaunch,
    skinny_launch,
    slice_count,
    slice_width,
    slices_launch,
)
from tp_mamba.kernels.linear.reference import add_slices, skinny_linear_reference
from tp_mamba.kernels.linear.skinny import (
    prefers_skinny,
    prefers_slices,
    skinny_linear,
    skinny_linear_slices,
)
from tp_mamba.layers import linear as layers
from tp_mamba.layers.linear import RowParallelLinear
from tp_mamba.parallel.group import TensorParallel

_HAS_DEPENDENT_LAUNCH = "tp_mamba.kernels.common.dependent_launch.has_dependent_launch"

DTYPES = [torch.bfloat16, torch.float16]
SIZES = [
    (1, 33, 70),
    (2, 1, 1),
    (3, 301, 1000),  # several slices, the last one short
    (8, 288, 512),
    (9, 40, 257),  # a last slice of one column
    (16, 64, 130),
    (17, 70, 640),
    (33, 50, 300),
    (64, 130, 200),
    (100, 20, 300),  # two tiles of x
    (2, 1030, 1100),  # the width of slices for many weight rows
]
"""M, N, K."""

DECODE = [(288, 8192), (288, 4096), (4096, 8192), (4096, 4096), (8192, 4096), (16384, 4096)]
"""N, K of falcon-mamba-7b's projections, on one GPU and on one of two."""

FASTEST = {
    (8, 288, 8192): SkinnyLaunch(8, 32, 64, 1, 2, 5),
    (32, 288, 8192): SkinnyLaunch(32, 32, 64, 1, 2, 5),
    (64, 288, 8192): SkinnyLaunch(64, 32, 64, 1, 2, 5),
    (64, 288, 4096): SkinnyLaunch(64, 32, 64, 1, 2, 5),
    (8, 16384, 4096): SkinnyLaunch(16, 128, 128, 4, 4, 5, in_turn=True),
    (16, 16384, 4096): SkinnyLaunch(16, 128, 128, 4, 4, 5, in_turn=True),
    (32, 16384, 4096): SkinnyLaunch(32, 128, 128, 4, 4, 4, in_turn=True),
    (8, 8192, 4096): SkinnyLaunch(16, 64, 128, 4, 4, 7, in_turn=True),
    (16, 8192, 4096): SkinnyLaunch(16, 64, 128, 4, 4, 7, in_turn=True),
    (32, 8192, 4096): SkinnyLaunch(32, 64, 128, 4, 4, 6, in_turn=True),
    (1, 4096, 8192): SkinnyLaunch(8, 32, 128, 8, 2, 3),
    (8, 4096, 8192): SkinnyLaunch(16, 64, 128, 4, 4, 7, in_turn=True),
    (16, 4096, 8192): SkinnyLaunch(16, 64, 128, 4, 4, 7, in_turn=True),
    (32, 4096, 8192): SkinnyLaunch(32, 64, 128, 4, 4, 6, in_turn=True),
    (8, 4096, 4096): SkinnyLaunch(16, 64, 128, 2, 4, 7, in_turn=True),
    (32, 4096, 4096): SkinnyLaunch(32, 64, 128, 2, 4, 6, in_turn=True),
}
"""By M, N, K: of the cuts tried, some thirty a shape, the one with which a GPU ran in the least time: x_proj's alone on
an H200, the others' within a decode step on an H100."""

CUTS = [
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=16, BLOCK_K=128, group=1, num_warps=1, num_stages=2),
    SkinnyLaunch(BLOCK_M=32, BLOCK_N=32, BLOCK_K=64, group=2, num_warps=2, num_stages=4),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, group=4, num_warps=2, num_stages=3),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, group=4, num_warps=4, num_stages=4, in_turn=True),
    SkinnyLaunch(BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, group=2, num_warps=4, num_stages=3, in_turn=True),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, group=8, num_warps=2, num_stages=3),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, group=4, num_warps=2, num_stages=3),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, group=2, num_warps=2, num_stages=3, in_turn=True),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, group=8, num_warps=2, num_stages=4, in_turn=True),
    SkinnyLaunch(16, 64, 128, group=4, num_warps=4, num_stages=7, in_turn=True),
    SkinnyLaunch(16, 64, 128, group=2, num_warps=4, num_stages=6, in_turn=True),
]


@pytest.fixture(autouse=True)
def interpreter_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as integers, and sums in whatever order numpy does.

    Here it sums as the tensor core's instructions do, 16 columns after 16, so that an order can be tested.
    """
    from triton.runtime import interpreter

    repair()  # before this patch: what the patch restores is then repaired
    bf16 = interpreter.tl.bfloat16

    def widened(x: Any) -> Any:
        if x.dtype.scalar != bf16:
            return x.data.astype(np.float64)
        return (x.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def dot(self: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
        wide_a, wide_b, total = widened(a), widened(b), sums.data
        for k in range(0, wide_a.shape[1], 16):
            total = (total + wide_a[:, k : k + 16] @ wide_b[k : k + 16]).astype(np.float32)
        return interpreter.TensorHandle(total, sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


@pytest.fixture(params=[*DEVICES, "cpu"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Both implementations: Triton as in ``device``, and plain torch."""
    return torch.device("cpu") if request.param == "cpu" else triton_device(request.param, monkeypatch)


def make(M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed + M + N + K)
    return {
        "x": torch.randn(M, K, generator=g).to(dtype),
        "weight": (torch.randn(N, K, generator=g) * K**-0.5).to(dtype),
    }


def check(
    inputs: dict[str, Any],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One call against float64; every element of what the op allocates is written."""
    new_empty = torch.Tensor.new_empty
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor, "new_empty", lambda *args, **kwargs: poisoned_like(new_empty(*args, **kwargs))
        )
        actual = skinny_linear(**to(inputs, device), out_dtype=out_dtype)
    assert actual.dtype == (out_dtype or inputs["x"].dtype)
    assert actual.is_contiguous()
    exact = skinny_linear_reference(**double(inputs))
    if actual.dtype == torch.float32:
        assert_float32_sums(actual, exact, inputs["weight"])
    else:
        assert_within_twice(actual, skinny_linear_reference(**inputs), exact)
    return actual


def assert_float32_sums(actual: torch.Tensor, exact: torch.Tensor, weight: torch.Tensor) -> None:
    """Every step of a chain and of the tree may cut off one unit in the last place, as a tensor core's adder does.

    (Plain float32 is no measure: it rounds to nearest.) A partial sum rounded to 16 bits would err a hundred times
    more.
    """
    N, K = weight.shape
    steps = slice_width(N, K) // 16 + slice_count(N, K).bit_length()
    size = exact.abs() + exact.square().mean().sqrt()
    error = (actual.cpu().double() - exact) / size
    assert error.square().mean().sqrt() <= steps * torch.finfo(torch.float32).eps
    assert error.abs().max() <= 4 * steps * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_matches_float64(
    any_device: torch.device, monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    check(make(M, N, K, dtype), any_device, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 288, 1024), (5, 33, 300), (2, 1030, 1100)])
def test_float32_results_are_not_rounded_on_the_way(
    any_device: torch.device, monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    check(make(M, N, K, dtype), any_device, monkeypatch, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 32, 64, 128])
@pytest.mark.parametrize(("N", "K"), DECODE)
def test_decode_shapes(monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int) -> None:
    for out_dtype in (torch.bfloat16, torch.float32):
        check(make(M, N, K), torch.device("cuda"), monkeypatch, out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [9, 32])
@pytest.mark.parametrize(
    ("N", "K"), [(8192, 1000), (8192, 4001), (4096, 2000), (4096, 8000), (16384, 2040), (2112, 16000)]
)
def test_tall_tiles_of_a_ragged_k(monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int) -> None:
    """Wide weights whose last slice is short: one to eight slices a program, in one to four groups."""
    assert skinny_launch(M, N, K).in_turn
    check(make(M, N, K), torch.device("cuda"), monkeypatch, torch.float32)


@pytest.mark.parametrize("M", [1, 5, 20])
def test_any_strides(any_device: torch.device, monkeypatch: pytest.MonkeyPatch, M: int) -> None:
    """x as columns of a wider tensor or transposed; weight rows apart."""
    plain = make(M, 50, 320)
    wide, tall = torch.zeros(M, 400).bfloat16(), torch.zeros(100, 352).bfloat16()
    wide[:, 3:323], tall[::2, 16:336] = plain["x"], plain["weight"]
    expected = check(plain, any_device, monkeypatch)
    for change in (
        {"x": wide[:, 3:323]},
        {"x": plain["x"].t().contiguous().t()},
        {"x": plain["x"].repeat(2, 1)[::2][:1].expand(M, -1)},
        {"weight": tall[::2, 16:336]},
    ):
        actual = check(plain | change, any_device, monkeypatch)
        if not ("x" in change and change["x"].stride(0) == 0):
            torch.testing.assert_close(actual, expected, rtol=0.01, atol=1e-3)


def test_row_depends_neither_on_its_batch_nor_on_its_size(device: torch.device) -> None:
    for N, K in ((72, 1500), (1060, 1100)) if device.type == "cpu" else (*DECODE, (301, 5000)):
        most = 64 if device.type == "cpu" and N > 1024 else 128  # the larger takes the interpreter seconds
        inputs = to(make(most, N, K), device)

        def rows(start: int, stop: int, inputs: dict[str, Any] = inputs) -> torch.Tensor:
            return skinny_linear(inputs["x"][start:stop], inputs["weight"], out_dtype=torch.float32)

        whole = rows(0, most)
        for start, stop in ((0, 1), (most - 1, most), (5, 13), (20, 33), (most - 57, most - 24)):
            assert torch.equal(rows(start, stop), whole[start:stop]), (N, K, start, stop)


def run_cut(
    inputs: dict[str, Any], cut: SkinnyLaunch, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    from tp_mamba.kernels.linear.mixer import launch

    x, weight = inputs["x"], inputs["weight"]
    out = poisoned_like(x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype))
    launch(out, x, weight, cut)
    return out


@pytest.mark.parametrize(("N", "K"), [(70, 256), (70, 1400), (70, 2048), (1030, 4096)])
def test_no_bit_depends_on_the_cut(device: torch.device, N: int, K: int) -> None:
    """Six slices of 256, the last one short, end in groups of one, two, four and eight; so do four of 1024."""
    inputs = to(make(9, N, K), device)
    expected = skinny_linear(**inputs, out_dtype=torch.float32)
    for cut in CUTS if N < 1024 else CUTS[-2:]:
        assert torch.equal(run_cut(inputs, cut), expected), cut
        # Of one group the sums are rounded by the kernel that made them, of several by the next.
        assert torch.equal(run_cut(inputs, cut, torch.bfloat16), expected.bfloat16()), cut


@pytest.mark.parametrize("cut", CUTS)
def test_slices_are_added_in_a_binary_tree(device: torch.device, cut: SkinnyLaunch) -> None:
    """``2^25 + 1`` is ``2^25`` in float32: one after the other would end in 1, pairs of another distance in 4."""
    slices = [2.0**25, 1.0, -(2.0**25), 1.0, 2.0**25, 1.0, -(2.0**25), 1.0]
    weight = torch.zeros(20, 2048, dtype=torch.bfloat16)
    weight[:, 100::256] = torch.tensor(slices, dtype=torch.bfloat16)
    inputs = to({"x": torch.ones(3, 2048, dtype=torch.bfloat16), "weight": weight}, device)
    assert torch.equal(run_cut(inputs, cut), torch.zeros(3, 20, device=device))


def test_halves_of_k_add_up_to_the_bits_of_the_whole(device: torch.device) -> None:
    """As two ranks hold them, where the halves are 1, 2, 4, .. slices."""
    inputs = to(make(3, 80, 2048), device)
    x, weight = inputs["x"], inputs["weight"]
    parts = [
        skinny_linear(x[:, k : k + 1024], weight[:, k : k + 1024], out_dtype=torch.float32) for k in (0, 1024)
    ]
    assert torch.equal(parts[0] + parts[1], skinny_linear(x, weight, out_dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 40, 2048), (40, 33, 700), (128, 20, 257), (9, 16, 8200)])
def test_slices_add_up_to_the_whole(
    device: torch.device, M: int, N: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; ragged K, all classes of rows, and from 32 slices on two of them in each sum."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **options: poisoned_like(new_empty(*args, **options))
    )
    check_slices(to(make(M, N, K, dtype), device), bits=True)
    monkeypatch.setattr("tp_mamba.kernels.linear.skinny.use_triton", lambda x: False)
    check_slices(make(M, N, K, dtype), bits=False)


def check_slices(inputs: dict[str, Any], bits: bool) -> None:
    (M, K), N = inputs["x"].shape, len(inputs["weight"])
    width = slice_width(N, K) * slices_launch(M, N, K).group
    slices = skinny_linear_slices(**inputs)
    assert slices.shape == (-(-K // width), M, N)
    assert slices.dtype == torch.float32
    assert slices.is_contiguous()
    whole = skinny_linear(**inputs, out_dtype=torch.float32)
    assert not bits or torch.equal(add_slices(slices), whole)
    for i, part in ((slice(None), add_slices(slices)), (slice(width), slices[0])):
        x, weight = (y[:, i].cpu().double() for y in inputs.values())
        assert_float32_sums(part, x @ weight.t(), weight)


def test_slices_of_any_strides(any_device: torch.device) -> None:
    """x as columns of a wider tensor or transposed; weight rows apart."""
    plain = to(make(5, 24, 600), any_device)
    wide, tall = (torch.zeros(size, 700, device=any_device).bfloat16() for size in (5, 48))
    wide[:, 3:603], tall[::2, 16:616] = plain["x"], plain["weight"]
    expected = skinny_linear_slices(**plain)
    for change in (
        {"x": wide[:, 3:603]},
        {"x": plain["x"].t().contiguous().t()},
        {"weight": tall[::2, 16:616]},
    ):
        torch.testing.assert_close(skinny_linear_slices(**plain | change), expected, rtol=0, atol=1e-5)


def test_slices_of_nothing(any_device: torch.device) -> None:
    x, weight = (torch.zeros(n, 600, device=any_device).half() for n in (3, 5))
    assert skinny_linear_slices(x[:0], weight).shape == (3, 0, 5)
    assert skinny_linear_slices(x, weight[:0]).shape == (3, 3, 0)


@pytest.mark.parametrize("slices", [False, True])
def test_nothing_is_launched_for_nothing(monkeypatch: pytest.MonkeyPatch, slices: bool) -> None:
    inputs = make(3, 5, 600)
    assert "_product_kernel" in record(monkeypatch, inputs, slices=slices)
    for name, x in inputs.items():
        assert record(monkeypatch, inputs | {name: x[:0]}, slices=slices) == {}


def test_slices_refuse_what_the_product_refuses() -> None:
    with pytest.raises(ValueError, match="x has 129 rows but at most 128 are taken"):
        skinny_linear_slices(torch.zeros(129, 8).half(), torch.zeros(4, 8).half())
    with pytest.raises(RuntimeError, match="weight requires grad"):
        skinny_linear_slices(torch.zeros(2, 8).half(), torch.zeros(4, 8).half().requires_grad_())


def test_nothing_to_do(any_device: torch.device) -> None:
    x = torch.randn(3, 4, device=any_device).half()
    weight = torch.randn(5, 4, device=any_device).half()
    assert skinny_linear(x[:0], weight).shape == (0, 5)
    assert skinny_linear(x, weight[:0]).shape == (3, 0)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    weight = torch.randn(8192, device="cuda").bfloat16().repeat(300_000, 1)
    weight[-2000:] = torch.randn(2000, 8192, device="cuda").bfloat16()
    x = torch.randn(2, 8192, device="cuda").bfloat16()
    assert torch.equal(skinny_linear(x, weight)[:, -2000:], skinny_linear(x, weight[-2000:]))


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), DECODE)
def test_early_start_reads_nothing_too_early(N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph whose kernels ahead still write x, and weight too: with and without the early start, the same bits."""
    from tp_mamba.kernels.linear.mixer import launch

    old, new = (to(make(8, N, K, seed=seed), torch.device("cuda")) for seed in (0, 1))
    x, weight = old["x"].clone(), old["weight"].clone()
    expected = [skinny_linear(**each, out_dtype=torch.float32) for each in (new, old)]
    for pdl in (True, False):
        monkeypatch.setattr(_HAS_DEPENDENT_LAUNCH, lambda device, pdl=pdl: pdl)
        outs = [torch.empty_like(expected[0]) for _ in range(2)]

        def step(outs: list[torch.Tensor] = outs) -> None:
            for out, given, names in zip(outs, (new, old), (("weight", "x"), ("x", "weight")), strict=True):
                # Additions, not copies: copies may be nodes of another kind, which order the kernels fully.
                for name in names:
                    torch.add(given[name], 0.0, out=x if name == "x" else weight)
                launch(out, x, weight)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(50):
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            for out, right in zip(outs, expected, strict=True):
                assert torch.equal(out, right)


def test_compiled_and_opcheck(any_device: torch.device) -> None:
    inputs = to(make(3, 6, 40), any_device)
    for out_dtype in (torch.bfloat16, torch.float32):
        arguments = (inputs["x"], inputs["weight"], out_dtype)
        torch.library.opcheck(torch.ops.tp_mamba.skinny_linear.default, arguments)
        compiled = torch.compile(skinny_linear, fullgraph=True, backend="aot_eager")
        expected = skinny_linear(**inputs, out_dtype=out_dtype)
        assert torch.equal(compiled(**inputs, out_dtype=out_dtype), expected)
    inputs = to(make(9, 6, 700), any_device)
    torch.library.opcheck(torch.ops.tp_mamba.skinny_linear_slices.default, tuple(inputs.values()))


def test_prefers_itself_where_the_library_is_slower() -> None:
    rows = {
        **dict.fromkeys([(288, 4096), (160, 4096), (512, 2048)], 128),
        **dict.fromkeys([(288, 8192), (192, 5120)], 64),
        **dict.fromkeys([(4096, 4096), (4096, 8192), (8192, 4096), (16384, 4096)], 32),
        # Other wide weights, a small one, rows off the 16 bytes.
        **dict.fromkeys([(8192, 8192), (2560, 5120), (3072, 4096), (4096, 6144), (16384, 8192)], 0),
        **dict.fromkeys([(4096, 2048), (8192, 256), (80, 1536), (288, 4100)], 0),
    }
    for (N, K), most in rows.items():
        for dtype in DTYPES:
            taken = [M for M in range(200) if prefers_skinny(M, N, K, dtype)]
            assert taken == list(range(1, most + 1)), (N, K)
        assert not prefers_skinny(1, N, K, torch.float32)


def test_prefers_slices_of_narrow_weights() -> None:
    """Where the product is preferred at all, and of as many slices as a program may well add up."""
    for K, most in ((2048, 128), (4096, 128), (8192, 64), (16384, 64), (65536, 0)):
        for dtype in DTYPES:
            taken = [M for M in range(200) if prefers_slices(M, 288, K, dtype)]
            assert taken == list(range(1, most + 1)), K
    assert not prefers_slices(1, 288, 4096, torch.float32)
    assert prefers_skinny(8, 4096, 4096, torch.bfloat16)
    assert not prefers_slices(8, 4096, 4096, torch.bfloat16)


def test_wide_weights_in_one_launch() -> None:
    """Where a second one, which adds the slices, has not been measured to pay."""
    for M, N, K in ((1, 4096, 8192), (8, 16384, 4096), (32, 16384, 4096), (32, 8192, 4096)):
        cut = skinny_launch(M, N, K)
        assert prefers_skinny(M, N, K, torch.bfloat16)
        assert cut.group == slice_count(N, K)


@pytest.mark.parametrize(("shape", "cut"), FASTEST.items())
def test_cuts_are_the_fastest_measured(shape: tuple[int, int, int], cut: SkinnyLaunch) -> None:
    M, N, K = shape
    least = M // 2 + 1 if M > 8 else 1
    if M == 8 and (1, N, K) in FASTEST:
        least = 2
    for rows in range(least, M + 1):
        assert skinny_launch(rows, N, K) == cut


@pytest.mark.parametrize("M", [8, 16, 32])
@pytest.mark.parametrize(("N", "K"), [(16384, 4096), (8192, 4096), (4096, 8192), (4096, 4096)])
def test_a_multiprocessor_has_room_for_one_tall_tile(M: int, N: int, K: int) -> None:
    """And no more buffers than that takes: of two programs here and none there, the step waits for the two."""
    cut = skinny_launch(M, N, K)
    stage = 2 * (cut.BLOCK_M + cut.BLOCK_N) * cut.BLOCK_K
    assert (cut.num_stages - 2) * stage <= 114 * 1024 < (cut.num_stages - 1) * stage


@pytest.mark.parametrize(("N", "K"), [*DECODE, (192, 5120), (80, 1536), (2560, 5120), (1, 1), (65024, 4096)])
def test_cuts_fit_a_multiprocessor(N: int, K: int) -> None:
    """What the kernels rely on, and what the speed does: for the shapes of decode, programs for an H200."""
    for M in range(1, 129):
        cut = skinny_launch(M, N, K)
        assert cut.BLOCK_M // 2 < min(64, max(M, 9 if cut.in_turn else 5)) <= cut.BLOCK_M
        assert cut.num_warps <= (4 if cut.in_turn and cut.BLOCK_M < 64 else 2)
        assert cut.group in (1, 2, 4, 8)
        assert slice_width(N, K) % cut.BLOCK_K == 0
        at_once = 1 if cut.in_turn else cut.group
        buffers = 2 * (cut.num_stages - 1) * at_once * (cut.BLOCK_M + cut.BLOCK_N) * cut.BLOCK_K
        assert buffers <= 160 * 1024  # of 227
        programs = -(-N // cut.BLOCK_N) * -(-slice_count(N, K) // cut.group)
        if (N, K) in DECODE:
            assert programs >= 120
            # A microsecond of the memory's rate, or all that a program reads.
            weight_share = cut.BLOCK_N / (cut.BLOCK_M + cut.BLOCK_N)
            read = 2 * slice_width(N, K) * cut.group * cut.BLOCK_N
            assert min(buffers * weight_share, read) * programs / 132 >= min(26 * 1024, read * programs / 132)


@pytest.mark.parametrize(
    ("N", "K"), [(288, 8192), (288, 4096), (160, 4096), (1, 1), (80, 1500), (512, 16384)]
)
def test_cuts_of_slices_fit_a_multiprocessor(N: int, K: int) -> None:
    """The same sums for any number of rows, which the operator's fake implementation relies on too."""
    groups = {slices_launch(M, N, K).group for M in range(129)}
    assert len(groups) == 1
    assert groups <= {1, 2, 4, 8}
    for M in range(1, 129):
        cut = slices_launch(M, N, K)
        assert cut.BLOCK_M // 2 < min(64, max(M, 5)) <= cut.BLOCK_M
        assert cut.num_warps <= 2
        assert slice_width(N, K) % cut.BLOCK_K == 0
        buffers = 2 * (cut.num_stages - 1) * cut.group * (cut.BLOCK_M + cut.BLOCK_N) * cut.BLOCK_K
        assert buffers <= 160 * 1024


def record(
    monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], pdl: bool = True, slices: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Kernel and launch, by name, of what the Triton path would launch for a call on a Hopper GPU."""
    import tp_mamba.kernels.linear.mixer as module
    import tp_mamba.kernels.linear.skinny as op

    launches = {name: Launches() for name in ("_product_kernel", "_sum_kernel")}
    kernels = {name: getattr(module, name) for name in launches}
    with monkeypatch.context() as patch:
        for name in launches:
            patch.setattr(module, name, launches[name])
        patch.setattr(op, "use_triton", lambda x: True)
        patch.setattr(_HAS_DEPENDENT_LAUNCH, lambda device: pdl)
        (skinny_linear_slices if slices else skinny_linear)(**inputs)
    return {name: (kernels[name], *each.calls) for name, each in launches.items() if each.calls}


@pytest.mark.parametrize(
    ("N", "K", "slices", "expected"),
    [
        (288, 1024, False, {0: 1, 8: 1, 16: 1, 32: 1, 64: 1}),
        (288, 1024, True, {8: 1, 16: 1, 32: 1, 64: 1}),
        # Two sums or four.
        (4096, 4096, False, {0: 2, 16: 1, 32: 1, 64: 1}),
    ],
)
def test_a_compilation_for_each_class_of_row_counts(
    monkeypatch: pytest.MonkeyPatch, N: int, K: int, slices: bool, expected: dict[int, int]
) -> None:
    """By BLOCK_M; 0 stands for the kernel that adds the sums up."""
    keys: dict[int, set[str]] = {}
    x, weight = torch.zeros(128, K).bfloat16(), torch.zeros(N, K).bfloat16()
    for M in range(1, 129):
        recorded = record(monkeypatch, {"x": x[:M], "weight": weight}, slices=slices)
        block = recorded["_product_kernel"][1][1]["BLOCK_M"]
        keys.setdefault(block, set()).add(specialization(*recorded["_product_kernel"]))
        if "_sum_kernel" in recorded:
            keys.setdefault(0, set()).add(specialization(*recorded["_sum_kernel"]))
    assert {block: len(each) for block, each in keys.items()} == expected


def test_no_compilation_for_another_stride_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    for M in (1, 4):  # columns of a wider tensor; for a single row, of one of another alignment too
        plain = make(M, 288, 1024)
        wide = plain | {"x": torch.zeros(M, 2048 if M > 1 else 1023 + 2).bfloat16()[:, :1024]}
        pair = [specialization(*record(monkeypatch, inputs)["_product_kernel"]) for inputs in (plain, wide)]
        assert pair[0] == pair[1]


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 288, 8192),
        (16, 288, 8192),
        (32, 288, 8192),
        (64, 288, 8192),
        (128, 288, 4096),
        (8, 4096, 8192),
        (16, 4096, 8192),
        (32, 4096, 8192),
        (8, 16384, 4096),
        (16, 16384, 4096),
        (32, 16384, 4096),
        (32, 8192, 4096),
        (8, 4096, 4096),
        (16, 4096, 4096),
        (32, 4096, 4096),
        (64, 4096, 4096),
        (16, 301, 1000),
        (64, 4001, 4097),
    ],
)
def test_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, M: int, N: int, K: int) -> None:
    """Only the instruction whose sums do not depend on the tile; no values read before the wait; no spills.

    (Rows whose addresses are no multiples of 16 bytes are loaded element by element, which may take more registers
    than there are.)
    """
    from triton import knobs

    launches = [*record(monkeypatch, make(M, N, K)).items()]
    if N < 512:
        launches += record(monkeypatch, make(M, N, K), slices=True).items()
    for name, recorded in launches:
        compiled = compile_as_launched(*recorded)
        assert stack_bytes(compiled, tmp_path) == 0 or K % 16 != 0
        assert compiled.metadata.shared <= 227 * 1024
        in_turn = name == "_product_kernel" and recorded[1][1]["IN_TURN"]
        assert read_ahead(compiled) == ({"weight_ptr"} if in_turn else set())  # into the L2 alone
        assert ("prefetch.global.L2" in compiled.asm["ptx"]) == in_turn
        assert "wgmma" not in compiled.asm["ptx"]
        assert ("mma.sync.aligned.m16n8k16" in compiled.asm["ptx"]) == (name == "_product_kernel")
        if name == "_product_kernel" and K % 16 == 0:
            command = [knobs.nvidia.cuobjdump.path, "-sass", str(tmp_path / "kernel.cubin")]
            sass = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            # Weights and x go to shared memory 16 bytes a thread at a time, and by no other way.
            copies = set(re.findall(r"LDGSTS\S*|LDG\S*(?<!LDGDEPBAR)(?=\s+R)", sass)) - {"LDGDEPBAR"}
            assert copies == {"LDGSTS.E.BYPASS.128"}


def test_without_early_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for recorded in record(monkeypatch, make(1, 288, 1024), pdl=False).values():
        compiled = compile_as_launched(*recorded)
        assert not compiled.metadata.launch_pdl
        assert "griddepcontrol" not in compiled.asm["ptx"]


class Products:
    """What a layer on a GPU would call, noted and computed here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[str] = []
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr("tp_mamba.kernels.linear.skinny.use_triton", lambda x: False)
        monkeypatch.setattr(torch, "mm", self.mm)
        for module, name in (
            (layers, "skinny_linear"),
            (layers, "skinny_linear_slices"),
            (linear_module, "skinny_linear"),
            (F, "linear"),
        ):
            monkeypatch.setattr(module, name, self.noted(name, getattr(module, name)))

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
        ((3, 2048), {"x_grad": True}, "linear"),
        ((3, 2048), {"weight_grad": True}, "linear"),
        ((3, 2048), {"weight_grad": True, "no_grad": True}, "skinny_linear"),
        ((3, 2048), {"bias": True}, "skinny_linear"),
        ((3, 2048), {"bias": True, "wide": True}, "skinny_linear"),
        ((3, 2048), {"wide": True}, "skinny_linear"),
        ((65, 2048), {"wide": True}, "skinny_linear"),
        ((129, 2048), {"wide": True}, "mm"),
        ((3, 2048), {"wide": True, "x_grad": True}, "linear"),
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
    assert products.called[:1] == [expected]  # what is computed here in its place may call others
    assert y.dtype == (torch.float32 if wide else dtype)
    assert y.requires_grad == (expected == "linear" and bool({"x_grad", "weight_grad"} & {*changes}))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2 * torch.finfo(y.dtype).eps * 4)


def row_parallel(size: int = 2048, dtype: torch.dtype = torch.bfloat16, **options: Any) -> RowParallelLinear:
    torch.manual_seed(0)
    options = {"bias": False, "reduce_in_float32": True, "tp": TensorParallel(device="cpu")} | options
    return RowParallelLinear(size, 24, dtype=dtype, **options).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 5, 128])
def test_a_row_parallel_layer_gives_slices(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    layer, x = row_parallel(), torch.randn(rows, 2048).bfloat16()
    products = Products(monkeypatch)
    slices = layer(x, in_slices=True)
    monkeypatch.undo()
    assert products.called[0] == "skinny_linear_slices"
    assert slices.shape == (slice_count(24, 2048), rows, 24)
    assert slices.dtype == torch.float32
    assert_float32_sums(add_slices(slices), x.double() @ layer.weight.double().t(), layer.weight)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((0, 2048), {}),
        ((129, 2048), {}),
        ((2048,), {}),
        ((1, 3, 2048), {}),
        ((3, 1024), {}),
        ((3, 2048), {"bias": True}),
        ((3, 2048), {"skip_bias_add": True}),
        ((3, 2048), {"reduce_in_float32": False}),
        ((3, 2048), {"dtype": torch.float32}),
        ((3, 2048), {"ranks": 2}),
        ((3, 2048), {"on": "cpu"}),
        ((3, 2048), {"weight_grad": True}),
        ((3, 2048), {"x_grad": True}),
    ],
)
def test_a_row_parallel_layer_gives_no_slices_of(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    """What it gives then is the whole product, over all ranks, and the bias."""
    kept = {
        name: value for name, value in options.items() if name in RowParallelLinear.__init__.__kwdefaults__
    }
    kept |= {name: options[name] for name in ("bias", "skip_bias_add") if name in options}
    layer, ranks = row_parallel(shape[-1], **kept), options.get("ranks", 1)
    layer.weight.requires_grad_("weight_grad" in options)
    x = torch.randn(shape).to(layer.weight.dtype).requires_grad_("x_grad" in options)
    exact = ranks * F.linear(x.double(), layer.weight.double())
    products = Products(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", options.get("on") != "cpu")
    monkeypatch.setattr(layer.tp, "size", ranks)
    monkeypatch.setattr(layer.tp, "all_reduce_", lambda y: y.mul_(ranks))  # all ranks hold the same
    y = layer(x, in_slices=True)
    monkeypatch.undo()
    assert "skinny_linear_slices" not in products.called
    if "skip_bias_add" in options:
        y, bias = y
        assert bias is None
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4).half()}, "x has shape [4] but must be [M, K]"),
        ({"x": torch.zeros(3, 0).half(), "weight": torch.zeros(6, 0).half()}, "x has shape [3, 0] but must"),
        ({"x": torch.zeros(129, 4).half()}, "x has 129 rows but at most 128 are taken"),
        ({"x": torch.zeros(3, 4)}, "x has dtype torch.float32 but must be bfloat16 or float16"),
        ({"weight": torch.zeros(6, 5).half()}, "weight has shape [6, 5] but must be [N, K] with K = 4"),
        ({"weight": torch.zeros(4).half()}, "weight has shape [4] but must be [N, K]"),
        (
            {"weight": torch.zeros(6, 4).bfloat16()},
            "weight has dtype torch.bfloat16 but x has torch.float16",
        ),
        ({"weight": torch.zeros(4, 6).half().t()}, "weight has stride 6 between columns"),
        ({"weight": torch.zeros(6, 4, device="meta").half()}, "weight is on meta but x is on cpu"),
        ({"out_dtype": torch.bfloat16}, "out_dtype is torch.bfloat16 but must be float32 or the dtype of x"),
        ({"out_dtype": torch.float64}, "out_dtype is torch.float64 but must be float32 or the dtype of x"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    inputs = make(3, 6, 4, torch.float16) | change
    with pytest.raises(ValueError, match=r"^skinny_linear: ") as refusal:
        skinny_linear(**inputs)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_no_gradient_is_cut_silently(name: str) -> None:
    inputs = make(3, 6, 4)
    inputs[name].requires_grad_()
    with pytest.raises(
        RuntimeError, match=f"skinny_linear: {name} requires grad but this op has no backward"
    ):
        skinny_linear(**inputs)
