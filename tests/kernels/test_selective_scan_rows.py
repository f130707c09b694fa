"""The scan's kernel for rows: the same bits at every launch, and what its loop costs on a Hopper GPU."""

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

LAUNCHES = [
    (1, 1, 4, False),
    (1, 2, 4, False),
    (1, 1, 4, True),
    (2, 1, 8, True),
    (2, 2, 4, False),
    (4, 1, 8, True),
]
"""Lanes, blocks, steps, whether B and C are loaded ahead."""


def launch_of(lanes: int, blocks: int, steps: int, ahead: bool) -> Any:
    """A stand-in for ``rows_launch_shape`` that always gives this launch."""

    def shape(sequences: int, channels: int, n: int) -> dict[str, int | bool]:
        block_d = 32 // lanes
        return {
            "N": n,
            "LANES": lanes,
            "BLOCK_D": block_d,
            "BLOCKS": blocks,
            "EVEN_D": channels % (blocks * block_d) == 0,
            "STEPS": steps,
            "BC_AHEAD": ahead,
            "num_warps": 1,
            "enable_fp_fusion": False,
        }

    return shape


@pytest.mark.parametrize("channels", [64, 70])
@pytest.mark.parametrize("where", DEVICES)
def test_bits_do_not_depend_on_the_launch(where: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of this kernel, and the general kernel: one output, one state; empty sequences among them."""
    device = triton_device(where, monkeypatch)
    inputs = to(make(channels, 16, [0, 1, 9, 21, 0], torch.bfloat16), device)
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}  # aligned, as the mixer's are
    module = sys.modules["tp_mamba.kernels.selective_scan_triton"]
    results = []
    for launch in [*LAUNCHES, None]:
        if launch is None:
            monkeypatch.setattr(module, "ROW_STATE_SIZES", ())
        else:
            monkeypatch.setattr(module, "rows_launch_shape", launch_of(*launch))
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


@pytest.mark.parametrize(
    ("launch", "most", "shuffles"),
    [((1, 2, 4, False), 115, 0), ((2, 1, 8, True), 2 * 80, 1), ((4, 1, 8, True), 4 * 58, 2)],
)
def test_instructions_of_the_loop(
    launch: tuple[int, int, int, bool],
    most: int,
    shuffles: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As the mixer calls it, 16 states: instructions a token of 32 channels, none of them a spill or a barrier."""
    from tp_mamba.kernels import selective_scan_rows_triton, selective_scan_triton

    lanes, blocks, steps, _ = launch
    recorded = Launches()
    monkeypatch.setattr(selective_scan_triton, "selective_scan_rows_kernel", recorded)
    monkeypatch.setattr(selective_scan_triton, "rows_launch_shape", launch_of(*launch))
    T, D, N = 8, 128, 16
    x = torch.zeros(T, 2 * D, dtype=torch.bfloat16)
    bc = torch.zeros(T, 2 * N)
    start = torch.tensor([0, T], dtype=torch.int32)
    states = torch.zeros(1, N, D).mT
    selective_scan_triton.selective_scan_triton(
        x[:, :D].t(), x[:, :D].t(), torch.zeros(N, D).t(), bc[:, :N].t()[None], bc[:, N:].t()[None],
        torch.zeros(D), x[:, D:].t(), None, False, start, start[:1], start[:1] > 0, states, None, -1, x[:, :D].t(),
    )  # fmt: skip
    compiled = compile_for_hopper(selective_scan_rows_triton.selective_scan_rows_kernel, recorded.calls[0])
    assert stack_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared == 0
    loop = loop_of(compiled.asm["cubin"], tmp_path)
    names = [instruction.split()[0].split(".")[0] for instruction in loop]
    assert names.count("MUFU") == steps * blocks * (16 // lanes + 2)  # the decays, and two of the gate
    assert names.count("SHFL") == steps * blocks * shuffles
    assert not {"BAR", "LDS", "STS", "LDL", "STL"} & {*names}
    assert sum("LDG.E.128" in instruction for instruction in loop) == steps * 8 // lanes
    assert len(loop) / steps / blocks * lanes <= most
