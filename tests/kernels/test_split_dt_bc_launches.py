"""What a cut of x_proj's output launches on a GPU: compilations, programs, and the order in which a row is summed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import Launches, compile_as_launched, specialization, stack_bytes
from split_dt_bc_testing import EPS, in_slices, make

from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.kernels.split_dt_bc.launch import LaunchPlan, launch_plan


def record(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """The kernel, and the launch that the Triton path would make for a call."""
    import tp_mamba.kernels.split_dt_bc as op
    import tp_mamba.kernels.split_dt_bc.any as module

    launches, kernel = Launches(), module._split_kernel
    with monkeypatch.context() as patch:
        patch.setattr(module, "_split_kernel", launches)
        patch.setattr(op, "use_triton", lambda x: True)
        split_dt_bc(**inputs)
    return kernel, launches.calls[0]


def test_one_compilation_for_all_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        specialization(*record(monkeypatch, make(T, 48, 16) | {"eps": EPS})) for T in (1, 2, 16, 33, 4096)
    }
    # A single row whose stride is some other number.
    keys.add(
        specialization(*record(monkeypatch, make(1, 48, 16) | {"eps": EPS, "x": torch.randn(80, 1).t()}))
    )
    assert len(keys) == 1
    of_slices = {
        specialization(*record(monkeypatch, in_slices(make(T, 48, 16) | {"eps": EPS}, 5)))
        for T in (1, 2, 16, 33, 128)
    }
    assert len(of_slices) == 1


def make_for_falcon(R: int, N: int, count: int, dt_dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    inputs = make(2, R, N, weighted=True) | {"eps": EPS, "dt_dtype": dt_dtype}
    return in_slices(inputs, count) if count else inputs


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(
    ("R", "N", "count"),
    [(256, 16, 0), (48, 16, 0), (512, 16, 0), (513, 255, 0), (256, 16, 16), (256, 16, 32), (48, 16, 5)],
)
def test_compiles_for_hopper_without_spills(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, R: int, N: int, count: int
) -> None:
    """x itself, and slices, which are loaded without a loop over them."""
    kernel, launch = record(monkeypatch, make_for_falcon(R, N, count))
    recorded = dict(zip(kernel.arg_names, launch[0], strict=False))
    assert (recorded["COUNT"], recorded["SIZE"]) == {0: (1, 1), 5: (5, 8)}.get(count, (count, count))
    compiled = compile_as_launched(kernel, launch)
    ptx = compiled.asm["ptx"]
    assert stack_bytes(compiled, tmp_path) == 0
    if count:
        assert ptx.count("ld.global") >= 2 * count
        assert (ptx.count("bar.sync") == 0) == (launch[1]["num_warps"] == 1)
    if R % 16 == 0:
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx


def row_layouts_of(compiled: Any) -> list[tuple[int, int, int]]:
    """For each row sum: columns and threads of a warp, and warps, along the row."""
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<(.*)>$", code, re.MULTILINE))
    found = []
    for rows, columns, layout in re.findall(r"\(tensor<(\d+)x(\d+)xf32, (#\w+)>\) ->", code):
        assert int(rows) >= 1
        adjacent, lanes, warps = (
            int(re.search(rf"{name} = \[\d+, (\d+)\]", layouts[layout])[1])  # type: ignore[index]
            for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
        )
        found.append((adjacent, lanes, min(warps, max(1, int(columns) // (adjacent * lanes)))))
    return found


@pytest.mark.parametrize(
    ("R", "N"),
    [(256, 16), (160, 16), (128, 16), (96, 16), (48, 16), (512, 16), (256, 8), (33, 5), (1024, 64)],
)
@pytest.mark.parametrize("dt_dtype", [torch.bfloat16, torch.float32])
def test_rows_lie_on_threads_alike_with_slices_and_without(
    monkeypatch: pytest.MonkeyPatch, R: int, N: int, dt_dtype: torch.dtype
) -> None:
    """Which is what the order of their sums, and so their bits, depends on."""
    whole, slices = (
        row_layouts_of(compile_as_launched(*record(monkeypatch, make_for_falcon(R, N, count, dt_dtype))))
        for count in (0, 16)
    )
    assert len(whole) == 2
    assert whole == slices


def test_slices_of_few_rows_are_spread_over_programs() -> None:
    """One row per program for Falcon-Mamba's R, where the same tile without slices has four."""
    assert launch_plan(256, 16, True, torch.bfloat16) == LaunchPlan(1, 256, 16, num_warps=1)
    assert launch_plan(256, 16, False, torch.bfloat16) == LaunchPlan(4, 256, 16, num_warps=4)
