"""x @ weight.T for few rows: the Triton kernels (interpreted, and on a GPU) and the CPU path against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_testing import DEVICES, assert_within_twice, double, poisoned_like, to, triton_device
from poisoning import poisoned_memory
from skinny_linear_testing import DECODE, DTYPES, assert_float32_sums, make, multiply_as_a_gpu

from tp_mamba.kernels.common.device import INTERPRETED
from tp_mamba.kernels.linear import skinny_linear, skinny_linear_slices
from tp_mamba.kernels.linear.launch import LaunchPlan, launch_plan, slice_width, slices_plan
from tp_mamba.kernels.linear.reference import add_slices, linear_reference, slices_reference

_HAS_DEPENDENT_LAUNCH = "tp_mamba.kernels.common.dependent_launch.has_dependent_launch"

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
"""M, out, k."""


CUTS = [
    LaunchPlan(BLOCK_M=16, BLOCK_OUT=16, BLOCK_K=128, group=1, num_warps=1, num_stages=2),
    LaunchPlan(BLOCK_M=32, BLOCK_OUT=32, BLOCK_K=64, group=2, num_warps=2, num_stages=4),
    LaunchPlan(BLOCK_M=16, BLOCK_OUT=64, BLOCK_K=64, group=4, num_warps=2, num_stages=3),
    LaunchPlan(BLOCK_M=16, BLOCK_OUT=64, BLOCK_K=128, group=4, num_warps=4, num_stages=4, in_turn=True),
    LaunchPlan(BLOCK_M=32, BLOCK_OUT=64, BLOCK_K=128, group=2, num_warps=4, num_stages=3, in_turn=True),
    LaunchPlan(BLOCK_M=16, BLOCK_OUT=32, BLOCK_K=64, group=8, num_warps=2, num_stages=3),
    LaunchPlan(BLOCK_M=16, BLOCK_OUT=32, BLOCK_K=128, group=4, num_warps=2, num_stages=3),
    LaunchPlan(BLOCK_M=16, BLOCK_OUT=32, BLOCK_K=64, group=2, num_warps=2, num_stages=3, in_turn=True),
    LaunchPlan(BLOCK_M=16, BLOCK_OUT=32, BLOCK_K=64, group=8, num_warps=2, num_stages=4, in_turn=True),
    LaunchPlan(16, 64, 128, group=4, num_warps=4, num_stages=7, in_turn=True),
    LaunchPlan(16, 64, 128, group=2, num_warps=4, num_stages=6, in_turn=True),
]


@pytest.fixture(autouse=True)
def interpreter_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_as_a_gpu(monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


@pytest.fixture(params=[*DEVICES, "cpu"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Both implementations: Triton as in ``device``, and plain torch."""
    return torch.device("cpu") if request.param == "cpu" else triton_device(request.param, monkeypatch)


def check(
    inputs: dict[str, Any],
    device: torch.device,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One call against float64; every element of what the op allocates is written."""
    with poisoned_memory():
        actual = skinny_linear(**to(inputs, device), out_dtype=out_dtype)
    assert actual.dtype == (out_dtype or inputs["x"].dtype)
    assert actual.is_contiguous()
    exact = linear_reference(**double(inputs))
    if actual.dtype == torch.float32:
        assert_float32_sums(actual, exact, inputs["weight"])
    else:
        assert_within_twice(actual, linear_reference(**inputs), exact)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_matches_float64(any_device: torch.device, M: int, N: int, K: int, dtype: torch.dtype) -> None:
    check(make(M, N, K, dtype), any_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 288, 1024), (5, 33, 300), (2, 1030, 1100)])
def test_float32_results_are_not_rounded_on_the_way(
    any_device: torch.device, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    check(make(M, N, K, dtype), any_device, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 32, 64, 128])
@pytest.mark.parametrize(("N", "K"), DECODE)
def test_decode_shapes(M: int, N: int, K: int) -> None:
    for out_dtype in (torch.bfloat16, torch.float32):
        check(make(M, N, K), torch.device("cuda"), out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [9, 32])
@pytest.mark.parametrize(
    ("N", "K"), [(8192, 1000), (8192, 4001), (4096, 2000), (4096, 8000), (16384, 2040), (2112, 16000)]
)
def test_tall_tiles_of_a_ragged_k(M: int, N: int, K: int) -> None:
    """Wide weights whose last slice is short: one to eight slices per program, in one to four groups."""
    assert launch_plan(M, N, K, INTERPRETED).in_turn
    check(make(M, N, K), torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("M", [1, 5, 20])
def test_any_strides(any_device: torch.device, M: int) -> None:
    """x as columns of a wider tensor or transposed; weight rows apart."""
    plain = make(M, 50, 320)
    wide, tall = torch.zeros(M, 400).bfloat16(), torch.zeros(100, 352).bfloat16()
    wide[:, 3:323], tall[::2, 16:336] = plain["x"], plain["weight"]
    expected = check(plain, any_device)
    for change in (
        {"x": wide[:, 3:323]},
        {"x": plain["x"].t().contiguous().t()},
        {"x": plain["x"].repeat(2, 1)[::2][:1].expand(M, -1)},
        {"weight": tall[::2, 16:336]},
    ):
        actual = check(plain | change, any_device)
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


def run_cut(inputs: dict[str, Any], cut: LaunchPlan, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
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
def test_slices_are_added_in_a_binary_tree(device: torch.device, cut: LaunchPlan) -> None:
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
    with poisoned_memory():
        check_slices(to(make(M, N, K, dtype), device), bits=True)
        monkeypatch.setattr("tp_mamba.kernels.linear.use_triton", lambda x: False)
        check_slices(make(M, N, K, dtype), bits=False)


def check_slices(inputs: dict[str, Any], bits: bool) -> None:
    (M, K), N = inputs["x"].shape, len(inputs["weight"])
    width = slice_width(N, K) * slices_plan(M, N, K).group
    slices = skinny_linear_slices(**inputs)
    assert slices.shape == (-(-K // width), M, N)
    assert slices.dtype == torch.float32
    assert slices.is_contiguous()
    whole = skinny_linear(**inputs, out_dtype=torch.float32)
    assert not bits or torch.equal(add_slices(slices), whole)
    x, weight = (y.cpu().double() for y in inputs.values())
    assert_float32_sums(add_slices(slices), linear_reference(x, weight), weight)
    for part, exact in zip(slices, slices_reference(x, weight, width), strict=True):
        assert_float32_sums(part, exact, weight)


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


def test_slices_refuse_what_the_product_refuses() -> None:
    with pytest.raises(ValueError, match="x has 129 rows but at most 128 are taken"):
        skinny_linear_slices(torch.zeros(129, 8).half(), torch.zeros(4, 8).half())


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4).half()}, "x has shape [4] but must be [M, k]"),
        ({"x": torch.zeros(3, 0).half(), "weight": torch.zeros(6, 0).half()}, "x has shape [3, 0] but must"),
        ({"x": torch.zeros(129, 4).half()}, "x has 129 rows but at most 128 are taken"),
        ({"x": torch.zeros(3, 4)}, "x has dtype torch.float32 but must be bfloat16 or float16"),
        ({"weight": torch.zeros(6, 5).half()}, "weight has shape [6, 5] but must be [out, k] with k = 4"),
        ({"weight": torch.zeros(4).half()}, "weight has shape [4] but must be [out, k]"),
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
