"""What a product of few rows launches: where it is preferred, how it is cut, what that compiles to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import Launches, compile_as_launched, sass_of, specialization, stack_bytes
from ptx_testing import read_ahead
from skinny_linear_testing import DECODE, DTYPES, make

from tp_mamba.kernels.common.device import INTERPRETED
from tp_mamba.kernels.linear import prefers_skinny, prefers_slices, skinny_linear, skinny_linear_slices
from tp_mamba.kernels.linear.launch import LaunchPlan, launch_plan, slice_count, slice_width, slices_plan

_HAS_DEPENDENT_LAUNCH = "tp_mamba.kernels.common.dependent_launch.has_dependent_launch"


FASTEST = {
    (8, 288, 8192): LaunchPlan(8, 32, 64, 1, 2, 5),
    (32, 288, 8192): LaunchPlan(32, 32, 64, 1, 2, 5),
    (64, 288, 8192): LaunchPlan(64, 32, 64, 1, 2, 5),
    (64, 288, 4096): LaunchPlan(64, 32, 64, 1, 2, 5),
    (8, 16384, 4096): LaunchPlan(16, 128, 128, 4, 4, 5, in_turn=True),
    (16, 16384, 4096): LaunchPlan(16, 128, 128, 4, 4, 5, in_turn=True),
    (32, 16384, 4096): LaunchPlan(32, 128, 128, 4, 4, 4, in_turn=True),
    (8, 8192, 4096): LaunchPlan(16, 64, 128, 4, 4, 7, in_turn=True),
    (16, 8192, 4096): LaunchPlan(16, 64, 128, 4, 4, 7, in_turn=True),
    (32, 8192, 4096): LaunchPlan(32, 64, 128, 4, 4, 6, in_turn=True),
    (1, 4096, 8192): LaunchPlan(8, 32, 128, 8, 2, 3),
    (8, 4096, 8192): LaunchPlan(16, 64, 128, 4, 4, 7, in_turn=True),
    (16, 4096, 8192): LaunchPlan(16, 64, 128, 4, 4, 7, in_turn=True),
    (32, 4096, 8192): LaunchPlan(32, 64, 128, 4, 4, 6, in_turn=True),
    (8, 4096, 4096): LaunchPlan(16, 64, 128, 2, 4, 7, in_turn=True),
    (32, 4096, 4096): LaunchPlan(32, 64, 128, 2, 4, 6, in_turn=True),
}
"""By M, out, k: the plan with which a GPU ran in the least time, of some thirty tried per shape: x_proj's alone on an
H200, the others' within a decode step on an H100."""


@pytest.mark.parametrize("slices", [False, True])
def test_nothing_is_launched_for_nothing(monkeypatch: pytest.MonkeyPatch, slices: bool) -> None:
    inputs = make(3, 5, 600)
    assert "_product_kernel" in record(monkeypatch, inputs, slices=slices)
    for name, x in inputs.items():
        assert record(monkeypatch, inputs | {name: x[:0]}, slices=slices) == {}


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
        cut = launch_plan(M, N, K, INTERPRETED)
        assert prefers_skinny(M, N, K, torch.bfloat16)
        assert cut.group == slice_count(N, K)


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(("shape", "cut"), FASTEST.items())
def test_cuts_are_the_fastest_measured(shape: tuple[int, int, int], cut: LaunchPlan) -> None:
    M, N, K = shape
    least = M // 2 + 1 if M > 8 else 1
    if M == 8 and (1, N, K) in FASTEST:
        least = 2
    for rows in range(least, M + 1):
        assert launch_plan(rows, N, K, INTERPRETED) == cut


@pytest.mark.parametrize("M", [8, 16, 32])
@pytest.mark.parametrize(("N", "K"), [(16384, 4096), (8192, 4096), (4096, 8192), (4096, 4096)])
def test_a_multiprocessor_has_room_for_one_tall_tile(M: int, N: int, K: int) -> None:
    """And no more buffers than that takes: of two programs here and none there, the step waits for the two."""
    cut = launch_plan(M, N, K, INTERPRETED)
    stage = 2 * (cut.BLOCK_M + cut.BLOCK_OUT) * cut.BLOCK_K
    assert (cut.num_stages - 2) * stage <= 114 * 1024 < (cut.num_stages - 1) * stage


@pytest.mark.parametrize(("N", "K"), [*DECODE, (192, 5120), (80, 1536), (2560, 5120), (1, 1), (65024, 4096)])
def test_cuts_fit_a_multiprocessor(N: int, K: int) -> None:
    """What the kernels rely on, and what the speed does: for the shapes of decode, programs for an H200."""
    for M in range(1, 129):
        cut = launch_plan(M, N, K, INTERPRETED)
        assert cut.BLOCK_M // 2 < min(64, max(M, 9 if cut.in_turn else 5)) <= cut.BLOCK_M
        assert cut.num_warps <= (4 if cut.in_turn and cut.BLOCK_M < 64 else 2)
        assert cut.group in (1, 2, 4, 8)
        assert slice_width(N, K) % cut.BLOCK_K == 0
        at_once = 1 if cut.in_turn else cut.group
        buffers = 2 * (cut.num_stages - 1) * at_once * (cut.BLOCK_M + cut.BLOCK_OUT) * cut.BLOCK_K
        assert buffers <= 160 * 1024  # of 227
        programs = -(-N // cut.BLOCK_OUT) * -(-slice_count(N, K) // cut.group)
        if (N, K) in DECODE:
            assert programs >= 120
            # A microsecond of the memory's rate, or all that a program reads.
            weight_share = cut.BLOCK_OUT / (cut.BLOCK_M + cut.BLOCK_OUT)
            read = 2 * slice_width(N, K) * cut.group * cut.BLOCK_OUT
            assert min(buffers * weight_share, read) * programs / 132 >= min(26 * 1024, read * programs / 132)


@pytest.mark.parametrize(
    ("N", "K"), [(288, 8192), (288, 4096), (160, 4096), (1, 1), (80, 1500), (512, 16384)]
)
def test_cuts_of_slices_fit_a_multiprocessor(N: int, K: int) -> None:
    """The same sums for any number of rows, which the operator's fake implementation relies on too."""
    groups = {slices_plan(M, N, K).group for M in range(129)}
    assert len(groups) == 1
    assert groups <= {1, 2, 4, 8}
    for M in range(1, 129):
        cut = slices_plan(M, N, K)
        assert cut.BLOCK_M // 2 < min(64, max(M, 5)) <= cut.BLOCK_M
        assert cut.num_warps <= 2
        assert slice_width(N, K) % cut.BLOCK_K == 0
        buffers = 2 * (cut.num_stages - 1) * cut.group * (cut.BLOCK_M + cut.BLOCK_OUT) * cut.BLOCK_K
        assert buffers <= 160 * 1024


def record(
    monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], pdl: bool = True, slices: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Kernel and launch, by name, of what the Triton path would launch for a call on a Hopper GPU."""
    import tp_mamba.kernels.linear as op
    import tp_mamba.kernels.linear.mixer as module

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


COMPILED = [
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
]
"""M, out, k of Falcon-Mamba's projections, and two that lie off the words of 16 bytes."""


@pytest.mark.parametrize(("M", "N", "K"), COMPILED)
def test_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int) -> None:
    """Only the instruction whose sums do not depend on the tile; no values read before the wait."""
    for name, recorded in launches_of(monkeypatch, M, N, K):
        compiled = compile_as_launched(*recorded)
        assert compiled.metadata.shared <= 227 * 1024
        in_turn = name == "_product_kernel" and recorded[1][1]["IN_TURN"]
        assert read_ahead(compiled) == ({"weight_ptr"} if in_turn else set())  # into the L2 alone
        assert ("prefetch.global.L2" in compiled.asm["ptx"]) == in_turn
        assert "wgmma" not in compiled.asm["ptx"]
        assert ("mma.sync.aligned.m16n8k16" in compiled.asm["ptx"]) == (name == "_product_kernel")


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(("M", "N", "K"), [shape for shape in COMPILED if shape[2] % 16 == 0])
def test_loads_whole_words_and_spills_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, M: int, N: int, K: int
) -> None:
    """(Other rows are loaded element by element, which may take more registers than there are.)"""
    for name, recorded in launches_of(monkeypatch, M, N, K):
        compiled = compile_as_launched(*recorded)
        assert stack_bytes(compiled, tmp_path) == 0
        if name == "_product_kernel":
            # Weights and x go to shared memory 16 bytes per thread at a time, and by no other way.
            loads = {op for op in sass_of(compiled, tmp_path) if re.match(r"LDG(STS)?(\.|$)", op)}
            assert loads == {"LDGSTS.E.BYPASS.128"}


def launches_of(monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int) -> list[tuple[str, Any]]:
    """What a product launches, and for a narrow weight what its slices do."""
    launches = [*record(monkeypatch, make(M, N, K)).items()]
    if N < 512:
        launches += record(monkeypatch, make(M, N, K), slices=True).items()
    return launches


def test_without_early_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for recorded in record(monkeypatch, make(1, 288, 1024), pdl=False).values():
        compiled = compile_as_launched(*recorded)
        assert not compiled.metadata.launch_pdl
        assert "griddepcontrol" not in compiled.asm["ptx"]
