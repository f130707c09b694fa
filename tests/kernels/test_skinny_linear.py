"""x @ weight.T for few rows: the Triton kernels (interpreted, and on a GPU) and the CPU path against float64."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_testing import (
    DEVICES,
    Launches,
    _bind,
    assert_within_twice,
    double,
    poisoned_like,
    specialization,
    stack_bytes,
    to,
    triton_device,
)

from tp_mamba.kernels.skinny_linear import prefers_skinny, skinny_linear
from tp_mamba.kernels.skinny_linear_launch import SkinnyLaunch, skinny_launch, slice_count, slice_width
from tp_mamba.kernels.skinny_linear_reference import skinny_linear_reference

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
    (2, 1030, 1100),  # the width of slices for many weight rows
]
"""M, N, K."""

DECODE = [(288, 8192), (288, 4096), (4096, 8192), (4096, 4096), (8192, 4096), (16384, 4096)]
"""N, K of falcon-mamba-7b's projections, on one GPU and on one of two."""

CUTS = [
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=16, BLOCK_K=128, group=1, num_warps=1, num_stages=2),
    SkinnyLaunch(BLOCK_M=32, BLOCK_N=32, BLOCK_K=64, group=2, num_warps=2, num_stages=4),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, group=4, num_warps=2, num_stages=3),
    SkinnyLaunch(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, group=8, num_warps=2, num_stages=3),
]


@pytest.fixture(autouse=True)
def interpreter_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as integers, and sums in whatever order numpy does.

    Here it sums as the tensor core's instructions do, 16 columns after 16, so that an order can be tested.
    """
    from triton.runtime import interpreter

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
@pytest.mark.parametrize("M", [1, 8, 32, 64])
@pytest.mark.parametrize(("N", "K"), DECODE)
def test_decode_shapes(monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int) -> None:
    for out_dtype in (torch.bfloat16, torch.float32):
        check(make(M, N, K), torch.device("cuda"), monkeypatch, out_dtype)


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
        inputs = to(make(64, N, K), device)

        def rows(start: int, stop: int, inputs: dict[str, Any] = inputs) -> torch.Tensor:
            return skinny_linear(inputs["x"][start:stop], inputs["weight"], out_dtype=torch.float32)

        whole = rows(0, 64)
        for start, stop in ((0, 1), (63, 64), (5, 13), (20, 33), (7, 40)):
            assert torch.equal(rows(start, stop), whole[start:stop]), (N, K, start, stop)


def run_cut(inputs: dict[str, Any], cut: SkinnyLaunch, **kwargs: Any) -> torch.Tensor:
    from tp_mamba.kernels.skinny_linear_triton import launch

    x, weight = inputs["x"], inputs["weight"]
    out = poisoned_like(x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32))
    launch(out, x, weight, cut, **kwargs)
    return out


@pytest.mark.parametrize("K", [256, 1400, 2048])
def test_no_bit_depends_on_the_cut(device: torch.device, K: int) -> None:
    """Six slices of 256, the last one short, end in groups of one, two, four and eight."""
    inputs = to(make(9, 70, K), device)
    expected = skinny_linear(**inputs, out_dtype=torch.float32)
    for cut in CUTS:
        assert torch.equal(run_cut(inputs, cut), expected), cut


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
def test_early_start_reads_nothing_too_early(N: int, K: int) -> None:
    """In a graph whose kernels ahead still write x, and weight too: with and without the early start, the same bits."""
    from tp_mamba.kernels.skinny_linear_triton import launch

    old, new = (to(make(8, N, K, seed=seed), torch.device("cuda")) for seed in (0, 1))
    x, weight = old["x"].clone(), old["weight"].clone()
    expected = [skinny_linear(**each, out_dtype=torch.float32) for each in (new, old)]
    for pdl in (True, False):
        outs = [torch.empty_like(expected[0]) for _ in range(2)]

        def step(outs: list[torch.Tensor] = outs, pdl: bool = pdl) -> None:
            for out, given, names in zip(outs, (new, old), (("weight", "x"), ("x", "weight")), strict=True):
                # Additions, not copies: copies may be nodes of another kind, which order the kernels fully.
                for name in names:
                    torch.add(given[name], 0.0, out=x if name == "x" else weight)
                launch(out, x, weight, pdl=pdl)

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


def test_refuses_more_rows_and_prefers_itself_where_the_library_is_slow() -> None:
    for N, K in ((288, 8192), (288, 4096), (160, 4096), (192, 5120)):
        assert all(prefers_skinny(M, N, K, dtype) for M in (1, 64) for dtype in DTYPES)
        assert not prefers_skinny(65, N, K, torch.bfloat16)
        assert not prefers_skinny(0, N, K, torch.bfloat16)
        assert not prefers_skinny(1, N, K, torch.float32)
    for N, K in (*DECODE[2:], (8192, 256), (80, 1536), (288, 4100)):
        assert not prefers_skinny(1, N, K, torch.bfloat16)


@pytest.mark.parametrize(("N", "K"), [*DECODE, (192, 5120), (80, 1536), (2560, 5120), (1, 1), (65024, 4096)])
def test_cuts_fit_a_multiprocessor(N: int, K: int) -> None:
    """What the kernels rely on, and what the speed does: for the shapes of decode, programs for an H200."""
    for M in range(1, 65):
        cut = skinny_launch(M, N, K)
        assert cut.BLOCK_M // 2 < max(M, 5) <= cut.BLOCK_M
        assert cut.num_warps <= 2
        assert cut.group in (1, 2, 4, 8)
        assert slice_width(N, K) % cut.BLOCK_K == 0
        buffers = 2 * (cut.num_stages - 1) * cut.group * (cut.BLOCK_M + cut.BLOCK_N) * cut.BLOCK_K
        assert buffers <= 96 * 1024
        programs = -(-N // cut.BLOCK_N) * -(-slice_count(N, K) // cut.group)
        if (N, K) in DECODE:
            assert programs >= 120
            # A microsecond of the memory's rate, or all that a program reads.
            weight_share = cut.BLOCK_N / (cut.BLOCK_M + cut.BLOCK_N)
            read = 2 * slice_width(N, K) * cut.group * cut.BLOCK_N
            assert min(buffers * weight_share, read) * programs / 132 >= min(26 * 1024, read * programs / 132)


def record(
    monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], pdl: bool = True
) -> dict[str, tuple[Any, Any]]:
    """Kernel and launch, by name, of what the Triton path would launch for a call on a Hopper GPU."""
    import tp_mamba.kernels.skinny_linear as op
    import tp_mamba.kernels.skinny_linear_triton as module

    launches = {name: Launches() for name in ("_product_kernel", "_sum_kernel")}
    kernels = {name: getattr(module, name) for name in launches}
    with monkeypatch.context() as patch:
        for name in launches:
            patch.setattr(module, name, launches[name])
        patch.setattr(op, "use_triton", lambda x: True)
        patch.setattr(module, "_has_dependent_launch", lambda device: pdl)
        skinny_linear(**inputs)
    return {name: (kernels[name], *each.calls) for name, each in launches.items() if each.calls}


def test_four_compilations_for_all_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[int, set[str]] = {}
    for M in range(1, 65):
        recorded = record(monkeypatch, make(M, 288, 1024))
        block = recorded["_product_kernel"][1][1]["BLOCK_M"]
        keys.setdefault(block, set()).add(specialization(*recorded["_product_kernel"]))
        keys.setdefault(0, set()).add(specialization(*recorded["_sum_kernel"]))
    assert {block: len(each) for block, each in keys.items()} == {0: 1, 8: 1, 16: 1, 32: 1, 64: 1}
    for M in (1, 4):  # columns of a wider tensor; for a single row, of one of another alignment too
        plain = make(M, 288, 1024)
        wide = plain | {"x": torch.zeros(M, 2048 if M > 1 else 1023 + 2).bfloat16()[:, :1024]}
        pair = [specialization(*record(monkeypatch, inputs)["_product_kernel"]) for inputs in (plain, wide)]
        assert pair[0] == pair[1]


def compile_as_launched(kernel: Any, launch: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The kernel compiled for sm_90 as the JIT does it: knowing which addresses are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", 90, 32)
    bound, keys, options = _bind(kernel, *launch)
    signature = {name: key[0] for name, key in zip(bound, keys, strict=True)}
    constants = {name: bound[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = [i for i, (kind, key) in enumerate(keys) if kind != "constexpr" and key]
    attributes = {(i,): make_backend(target).parse_attr(keys[i][1]) for i in aligned}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 288, 8192),
        (64, 288, 8192),
        (8, 4096, 8192),
        (16, 4096, 8192),
        (32, 4096, 4096),
        (64, 4096, 4096),
        (16, 301, 1000),
        (64, 4001, 4097),
    ],
)
def test_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, M: int, N: int, K: int) -> None:
    """Only the instruction whose sums do not depend on the tile; nothing read before the wait; no spills.

    (Rows whose addresses are no multiples of 16 bytes are loaded element by element, which may take more registers
    than there are.)
    """
    from triton import knobs

    for name, recorded in record(monkeypatch, make(M, N, K)).items():
        compiled = compile_as_launched(*recorded)
        assert stack_bytes(compiled, tmp_path) == 0 or K % 16 != 0
        ahead, wait, behind = compiled.asm["ptx"].partition("griddepcontrol.wait")
        reads = re.compile(r"ld\.global|cp\.async|st\.global")
        assert wait
        assert reads.search(behind)
        assert not reads.search(ahead)
        assert "griddepcontrol.launch_dependents" in behind
        assert compiled.metadata.launch_pdl
        assert "wgmma" not in behind
        assert ("mma.sync.aligned.m16n8k16" in behind) == (name == "_product_kernel")
        assert ("prefetch.global.L2" in ahead) == (name == "_product_kernel")
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
        assert "prefetch" not in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4).half()}, "x has shape [4] but must be [M, K]"),
        ({"x": torch.zeros(3, 0).half(), "weight": torch.zeros(6, 0).half()}, "x has shape [3, 0] but must"),
        ({"x": torch.zeros(65, 4).half()}, "x has 65 rows but at most 64 are taken"),
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
