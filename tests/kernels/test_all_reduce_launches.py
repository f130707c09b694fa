"""What sums between GPUs launch on a Hopper: programs that fit at once, accesses, the order of events."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import Launches, compile_as_launched, registers, specialization, stack_bytes
from ptx_testing import _instructions, read_ahead

from tp_mamba.kernels import all_reduce as op
from tp_mamba.kernels.all_reduce import Exchange, launch, shares
from tp_mamba.kernels.all_reduce.layout import CELL_BYTES, PROGRAMS, cells, inbox_bytes, most_programs
from tp_mamba.kernels.all_reduce.shares import Shares
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.split_dt_bc import split_dt_bc

R, N, EPS = 256, 16, 1e-6
HALF, WIDE = torch.bfloat16, torch.float32
KERNELS = {
    "any": ("_one_way_kernel", "_two_ways_kernel"),
    "norm": ("_all_reduce_add_rms_norm_kernel",),
    "split": ("_all_reduce_split_kernel",),
    "rows": ("_add_shares_kernel", "_words_kernel"),
}


def record(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> tuple[Any, Any, tuple[int, ...]]:
    """The kernel that a call launches, the launch as on a Hopper GPU, and its grid."""
    grids: list[tuple[int, ...]] = []

    class WithGrid(Launches):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return super().__getitem__(grid)

    recorded = {}
    with monkeypatch.context() as patch:
        patch.setattr("tp_mamba.kernels.common.dependent_launch.has_dependent_launch", lambda device: True)
        for folder in ("rms_norm", "split_dt_bc"):
            patch.setattr(f"tp_mamba.kernels.{folder}.use_triton", lambda x: True)
        places = {f"all_reduce.{name}": kernels for name, kernels in KERNELS.items()}
        for name, kernels in {
            **places,
            "rms_norm.any": ("_rms_norm_kernel",),
            "split_dt_bc.any": ("_split_kernel",),
        }.items():
            module = importlib.import_module(f"tp_mamba.kernels.{name}")
            for kernel in kernels:
                recorded[getattr(module, kernel)] = launches = WithGrid()
                patch.setattr(module, kernel, launches)
        call()
    ((kernel, launches),) = ((k, each) for k, each in recorded.items() if each.calls)
    return kernel, launches.calls[0], grids[0]


def exchange(size: int, rank: int = 1) -> Exchange:
    programs = most_programs(size, 132)
    return Exchange(rank, torch.zeros(size, dtype=torch.int64), torch.zeros(programs, dtype=torch.int32))


def plain(size: int, elements: int, dtype: torch.dtype = HALF) -> Callable[[], object]:
    return lambda: op.all_reduce(torch.zeros(elements, dtype=dtype), exchange(size))


def norm(
    size: int, T: int, H: int = 4096, dtype: torch.dtype = HALF, wide: bool = True
) -> Callable[[], object]:
    x, residual = torch.zeros(T, H, dtype=dtype), torch.zeros(T, H, dtype=WIDE if wide else dtype)
    weight = torch.zeros(H, dtype=dtype)
    return lambda: op.all_reduce_add_rms_norm(x, residual, weight, EPS, exchange(size), residual_in_fp32=wide)


def split(size: int, T: int, slices: int = 1) -> Callable[[], object]:
    weights = {"dt_weight": torch.zeros(R), "b_weight": torch.zeros(N), "c_weight": torch.zeros(N)}
    x = torch.zeros(slices, T, R + 2 * N) if slices > 1 else torch.zeros(T, R + 2 * N)
    return lambda: op.all_reduce_split_dt_bc(x, R, N, exchange(size), **weights, eps=EPS, dt_dtype=HALF)


CALLS = {
    "plain, small": plain(2, 4096),
    "plain, large": plain(2, 1 << 24),
    "plain, float32": plain(2, 1 << 24, WIDE),
    "plain, 8 ranks": plain(8, 4096),
    "plain, two ways": plain(8, 1 << 24),
    "norm": norm(2, 1),
    "norm, many rows": norm(2, 8192),
    "norm, 16-bit residual": norm(2, 5, wide=False),
    "norm, H 8192": norm(2, 5, 8192),
    "norm, 8 ranks": norm(8, 5),
    "split": split(2, 2000),
    "split of few rows": split(2, 5),
    "split of slices": split(2, 5, 16),
    "split of slices, 8 ranks": split(8, 5, 16),
}


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize("case", CALLS)
def test_compiles_for_hopper(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel, recorded, (programs,) = record(monkeypatch, CALLS[case])
    compiled = compile_as_launched(kernel, recorded)
    assert stack_bytes(compiled, tmp_path) == 0

    # All programs are on the GPU at once, and as many of another group beside them.
    threads = 32 * compiled.metadata.num_warps
    per_sm = -(-programs // 132)
    assert 2 * per_sm * threads * -(-registers(compiled, tmp_path) // 8) * 8 <= 65536
    assert 2 * per_sm * threads <= 2048

    # Blocks are stored and looked for in accesses of 16 bytes, and what is looked for comes from no cache.
    ptx = compiled.asm["ptx"]
    assert "ld.volatile.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx

    # Before its wait it reads what never changes, and writes nothing; no kernel behind it starts before its last store.
    names = [name for _, name, _ in _instructions(ptx)]
    wait, let = names.index("griddepcontrol.wait"), names.index("griddepcontrol.launch_dependents")
    assert names.count("griddepcontrol.wait") == names.count("griddepcontrol.launch_dependents") == 1
    assert not any(name.startswith(("st.", "ld.volatile", "fence")) for name in names[:wait])
    assert not any(name.startswith(("st.global", "ld.volatile")) for name in names[let:])

    # Marks that were put back are in memory before the block that goes two rounds further.
    assert names.count("fence.acq_rel.sys") == 1
    fence = names.index("fence.acq_rel.sys")
    assert names[fence:].index("bar.sync") < next(
        i for i, n in enumerate(names[fence:]) if n.startswith("st.global")
    )


def test_one_compilation_for_all_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for calls in (
        [norm(2, T) for T in (1, 2, 16, 33, 8192)],
        [split(2, T) for T in (1, 2, 16, 33)],
        [plain(2, 4096 * T) for T in (1, 2, 16, 33)],
    ):
        assert len({specialization(*record(monkeypatch, call)[:2]) for call in calls}) == 1


def layouts(compiled: Any) -> list[str]:
    """How the rows lie on threads whose squares are added up."""
    code = compiled.asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = #ttg\.blocked<(.*)>$", code, re.MULTILINE))
    return [named[name] for name in re.findall(r"\(tensor<\d+x\d+xf32, (#\w+)>\) ->", code)]


@pytest.mark.parametrize("H", [768, 2560, 4096, 8192])
@pytest.mark.parametrize(("dtype", "wide"), [(HALF, True), (HALF, False), (WIDE, True)])
def test_rows_of_a_norm_lie_on_threads_as_in_the_norm_alone(
    H: int, dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if H * dtype.itemsize > CELL_BYTES or (H == 2560 and dtype == WIDE):
        pytest.skip("two kernels, of which one is that norm")
    x, residual = torch.zeros(5, H, dtype=dtype), torch.zeros(5, H, dtype=WIDE if wide else dtype)
    alone = lambda: add_rms_norm(x, residual, torch.zeros(H, dtype=dtype), EPS, residual_in_fp32=wide)  # noqa: E731
    ours, theirs = (
        layouts(compile_as_launched(*record(monkeypatch, call)[:2]))
        for call in (norm(2, 5, H, dtype, wide), alone)
    )
    assert len(ours) == 1
    assert ours == theirs


def shares_of(size: int) -> Shares:
    words = [
        Exchange(1, torch.zeros(size, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)) for _ in range(2)
    ]
    memory = (torch.empty(1 << 20, dtype=torch.uint8),) * size
    return Shares(memory, memory, *words)


def norm_of_shares(
    size: int, H: int = 4096, dtype: torch.dtype = HALF, wide: bool = True
) -> Callable[[], object]:
    own, residual = torch.zeros(5, H, dtype=dtype), torch.zeros(5, H, dtype=WIDE if wide else dtype)
    weight, kept = torch.zeros(H, dtype=dtype), WIDE if wide else dtype
    return lambda: shares.add_shares_rms_norm(
        own, residual, weight, EPS, 5 * size, shares_of(size), residual_dtype=kept
    )


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize("size", [2, 8])
def test_large_sums_compile_for_hopper(size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel, recorded, _ = record(monkeypatch, norm_of_shares(size))
    compiled = compile_as_launched(kernel, recorded)
    assert stack_bytes(compiled, tmp_path) == 0
    assert registers(compiled, tmp_path) <= 64, "four programs of eight warps on an SM"
    assert read_ahead(compiled) == {"weight_ptr"}, "the kernel ahead waits for the others' terms"
    ptx = compiled.asm["ptx"]
    assert not re.search(r"(ld|st)\.global\.(b16|b32) ", ptx), "every access is of 16 bytes"

    # A word is sent behind a fence; what comes behind the wait for one is behind a fence too.
    for call in (shares.tell_terms_sent, shares.wait_for_rows):
        kernel, recorded, _ = record(monkeypatch, lambda call=call: call(shares_of(size)))
        names = [name for _, name, _ in _instructions(compile_as_launched(kernel, recorded).asm["ptx"])]
        assert names.count("fence.acq_rel.sys") == 1
        fence = names.index("fence.acq_rel.sys")
        stored = [i for i, name in enumerate(names) if name.startswith("st.global")]
        read = [i for i, name in enumerate(names) if name.startswith("ld.volatile.global")]
        assert (stored[0] > fence and not read) or (read and max(read) < fence)


@pytest.mark.parametrize(("H", "dtype", "wide"), [(768, WIDE, True), (4096, HALF, True), (8192, HALF, False)])
def test_rows_of_a_large_sum_lie_on_threads_as_in_the_norm_alone(
    H: int, dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, residual = torch.zeros(5, H, dtype=dtype), torch.zeros(5, H, dtype=WIDE if wide else dtype)
    alone = lambda: add_rms_norm(x, residual, torch.zeros(H, dtype=dtype), EPS, residual_in_fp32=wide)  # noqa: E731
    ours, theirs = (
        layouts(compile_as_launched(*record(monkeypatch, call)[:2]))
        for call in (norm_of_shares(2, H, dtype, wide), alone)
    )
    assert len(ours) == 1
    assert ours == theirs


def test_rows_of_a_split_lie_on_threads_as_in_the_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"dt_weight": torch.zeros(R), "b_weight": torch.zeros(N), "c_weight": torch.zeros(N)}
    for call, x in (
        (split(2, 3000), torch.zeros(3000, R + 2 * N)),
        (split(2, 5, 16), torch.zeros(16, 5, R + 2 * N)),
    ):
        alone = lambda x=x: split_dt_bc(x, R, N, **weights, eps=EPS, dt_dtype=HALF)  # noqa: E731
        ours, theirs = (
            layouts(compile_as_launched(*record(monkeypatch, each)[:2])) for each in (call, alone)
        )
        assert len(ours) == 2
        assert ours == theirs


def test_plans_stay_within_what_there_is() -> None:
    """Blocks in cells, programs in inboxes; small messages one way, and two ranks never the other."""
    for size in range(2, 9):
        programs = most_programs(size, 132)
        assert inbox_bytes(size, programs) == programs * 4 * cells(size) * CELL_BYTES <= 128 << 20
        assert most_programs(size, 50) <= PROGRAMS
        for elements in (1, 1000, 1 << 16, 1 << 20, 1 << 26):
            for dtype, out in ((HALF, HALF), (HALF, WIDE), (WIDE, WIDE)):
                plan = launch.plain_plan(elements, dtype, out, size, programs)
                assert plan.BLOCK_E * max(dtype.itemsize, out.itemsize) <= CELL_BYTES
                assert 1 <= plan.programs <= programs
                assert plan.two_ways == (size > 2 and elements * dtype.itemsize * (size - 2) > 2 << 20)
    assert launch.norm_goes_one_way(8192, 4096, HALF, 2)
    assert not launch.norm_goes_one_way(8192, 4096, HALF, 4)
    assert not launch.norm_goes_one_way(1, 8193, HALF, 2)
    assert launch.split_plan(8192, 256, 16, HALF, 8, 128) is None
