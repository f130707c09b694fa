"""The scan's kernels: the same bits at every launch, and what their loops cost on a Hopper GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import DEVICES, Launches, compile_for_hopper, stack_bytes, to, triton_device
from test_selective_scan import make

from tp_mamba.kernels.selective_scan import selective_scan_fn

ROWS = [(1, 4), (2, 4)]
"""Launches of the kernel for rows: blocks of channels, tokens a group."""
TILES = [(4, 16), (4, 8), (2, 4), (1, 4), (4, 1)]
"""Launches of the kernel for tiles: lanes a channel, tokens a group."""


def scan_module() -> Any:
    """The module as the dispatcher has it now: ``triton_device`` imports another one for the interpreter."""
    return sys.modules["tp_mamba.kernels.selective_scan_triton"]


def rows_launch(blocks: int, steps: int) -> Any:
    """A stand-in for ``mixer_launch`` that always gives this launch of the kernel for rows."""

    def launch(sequences: int, channels: int, n: int) -> tuple[Any, dict[str, Any]]:
        return scan_module().selective_scan_rows_kernel, {
            "N": n,
            "BLOCK_D": 32,
            "BLOCKS": blocks,
            "EVEN_D": channels % (blocks * 32) == 0,
            "STEPS": steps,
            "num_warps": 1,
            "enable_fp_fusion": False,
        }

    return launch


def tiles_launch(lanes: int, steps: int) -> Any:
    """A stand-in for ``mixer_launch`` that always gives this launch of the kernel for tiles."""

    def launch(sequences: int, channels: int, n: int) -> tuple[Any, dict[str, Any]]:
        return scan_module().selective_scan_tiles_kernel, {
            "N": n,
            "LANES": lanes,
            "BLOCK_D": 32 // lanes,
            "EVEN_D": channels % (32 // lanes) == 0,
            "STEPS": steps,
            "num_warps": 1,
            "enable_fp_fusion": False,
        }

    return launch


@pytest.mark.parametrize("channels", [32, 38])
@pytest.mark.parametrize("where", DEVICES)
def test_bits_do_not_depend_on_the_launch(where: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of both kernels, and the general kernel: one output, one state; empty sequences among them."""
    device = triton_device(where, monkeypatch)
    inputs = to(make(channels, 16, [0, 1, 19, 0], torch.bfloat16), device)
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}  # aligned, as the mixer's are
    results = []
    for launch in [
        *(rows_launch(*shape) for shape in ROWS),
        *(tiles_launch(*shape) for shape in TILES),
        None,
    ]:
        if launch is None:
            monkeypatch.setattr(scan_module(), "ROW_STATE_SIZES", ())
        else:
            monkeypatch.setattr(scan_module(), "mixer_launch", launch)
        results.append(selective_scan_fn(**inputs, return_last_state=True))
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


def loop_of(cubin: bytes, folder: Path) -> list[str]:
    """The instructions of a kernel's longest loop, in the machine's own language."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
    listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", found[1].strip()))
            back = re.search(r"BRA.*`\((\.L_\S+)\)", found[1])
            if back and back[1] in labels and len(instructions) - labels[back[1]] > len(longest):
                longest = instructions[labels[back[1]] :]
    return longest


def compile_launch(
    launch: Any, softplus: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, Any]]:
    """The kernel of a launch as the mixer calls it (or with softplus in it), 16 states, compiled; and its shape."""
    from tp_mamba.kernels import selective_scan_triton as module

    kernel, shape = launch(1, 128, 16)
    recorded = Launches()
    monkeypatch.setattr(module, kernel.__name__, recorded)
    monkeypatch.setattr(module, "mixer_launch", lambda *sizes: (recorded, shape))
    if "LANES" in shape:
        monkeypatch.setattr(module, "selective_scan_tiles_kernel", recorded)
    T, D, N = 8, 128, 16
    x = torch.zeros(T, 2 * D, dtype=torch.bfloat16)
    bc = torch.zeros(T, 2 * N)
    start = torch.tensor([0, T], dtype=torch.int32)
    module.selective_scan_triton(
        x[:, :D].t(), x[:, :D].t(), torch.zeros(N, D).t(), bc[:, :N].t()[None], bc[:, N:].t()[None],
        torch.zeros(D), x[:, D:].t(), torch.zeros(D) if softplus else None, softplus,
        start, start[:1], start[:1] > 0, torch.zeros(1, N, D).mT, None, -1, x[:, :D].t(),
    )  # fmt: skip
    return compile_for_hopper(kernel, recorded.calls[0]), shape


def names_of(loop: list[str]) -> list[str]:
    return [instruction.split()[0].split(".")[0] for instruction in loop]


def test_loop_of_the_kernel_for_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Instructions a token of 32 channels, none of them a spill, an exchange or a barrier."""
    compiled, shape = compile_launch(rows_launch(2, 4), False, monkeypatch)
    assert stack_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared == 0
    loop = loop_of(compiled.asm["cubin"], tmp_path)
    names, pairs = names_of(loop), shape["STEPS"] * shape["BLOCKS"]
    assert names.count("MUFU") == pairs * (16 + 2)  # the decays, and two of the gate
    assert not {"SHFL", "BAR", "LDS", "STS", "LDL", "STL"} & {*names}
    assert sum("LDG.E.128" in instruction for instruction in loop) == shape["STEPS"] * 8
    assert len(loop) / pairs <= 115


@pytest.mark.parametrize(
    ("lanes", "steps", "softplus", "most"),
    [(4, 16, False, 42), (4, 16, True, 46), (4, 8, False, 43), (2, 8, False, 70), (2, 4, False, 76)],
)
def test_loop_of_the_kernel_for_tiles(
    lanes: int, steps: int, softplus: bool, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Instructions a token: gate and softplus once a (token, channel), five changes of layout a group, no spill."""
    compiled, _ = compile_launch(tiles_launch(lanes, steps), softplus, monkeypatch)
    assert stack_bytes(compiled, tmp_path) == 0
    loop = loop_of(compiled.asm["cubin"], tmp_path)
    names = names_of(loop)
    once = 2 * softplus + 2  # a softplus and a gate are two each
    assert names.count("MUFU") == steps * 16 // lanes + steps * once // lanes
    assert names.count("SHFL") == steps * (lanes // 2)  # the sum over lanes, and nothing else
    assert names.count("BAR") == 5
    assert names.count("LDG") <= 7
    assert not {"LDL", "STL"} & {*names}
    assert len(loop) / steps <= most


def test_choice() -> None:
    """All warps of long sequences run at once; with many sequences, one lane a channel."""
    launch = scan_module().mixer_launch

    def chosen(sequences: int, channels: int, n: int = 16) -> tuple[Any, ...]:
        kernel, shape = launch(sequences, channels, n)
        return shape.get("LANES", kernel.__name__), shape["STEPS"]

    rows = ("selective_scan_rows_kernel", 4)
    assert [chosen(s, 8192) for s in (1, 2, 4, 16)] == [(4, 16), (4, 8), (2, 4), rows]
    assert chosen(64, 4096) == rows
    assert chosen(1, 1) == (4, 16)
    assert [chosen(1, 8192, n) for n in (4, 8, 32)] == [(1, 16), (2, 16), (4, 4)]
    assert [chosen(64, 8192, n) for n in (4, 8, 32)] == [rows, rows, (4, 4)]
