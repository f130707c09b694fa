"""The scan's kernels: the same bits at every launch, and what their loops cost on a Hopper GPU."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import DEVICES, Launches, compile_for_hopper, stack_bytes, to, triton_device
from test_selective_scan import make

from tp_mamba.kernels.selective_scan import selective_scan_fn

TILES = [(4, 16), (4, 8), (2, 16), (2, 4), (1, 4), (4, 1)]
"""Launches of the kernel for tiles: lanes a channel, tokens a group."""


def scan_module() -> Any:
    """The module as the dispatcher has it now: ``triton_device`` imports another one for the interpreter."""
    return importlib.import_module("tp_mamba.kernels.selective_scan.any")


def launch_of(lanes: int, steps: int) -> Any:
    """A stand-in for ``tiles_launch`` that always gives this one."""

    def launch(sequences: int, channels: int, n: int, softplus: bool) -> dict[str, Any]:
        return {
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
    """Every launch of the kernel for tiles, and the general kernel; empty sequences among them."""
    device = triton_device(where, monkeypatch)
    inputs = to(make(channels, 16, [0, 1, 19, 0], torch.bfloat16), device)
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}  # aligned, as the mixer's are
    results = []
    for shape in [*TILES, None]:
        if shape is None:
            monkeypatch.setattr(scan_module(), "TILE_STATE_SIZES", ())
        else:
            monkeypatch.setattr(scan_module(), "tiles_launch", launch_of(*shape))
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
    sequences: int, channels: int, softplus: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, Any]]:
    """What is launched for so many sequences and channels as a mixer calls it (or with softplus inside), compiled."""
    from tp_mamba.kernels.selective_scan import any as module

    kernel, shape = module.selective_scan_tiles_kernel, module.tiles_launch(sequences, channels, 16, softplus)
    recorded = Launches()
    monkeypatch.setattr(module, "selective_scan_tiles_kernel", recorded)
    monkeypatch.setattr(module, "tiles_launch", lambda *sizes: shape)
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


@pytest.mark.parametrize(
    ("sequences", "channels", "softplus", "most"),
    [
        (1, 4096, False, 42),
        (1, 4096, True, 46),
        (1, 8192, False, 66),
        (1, 8192, True, 80),
        (16, 8192, False, 132),
        (16, 8192, True, 156),
    ],
)
def test_loop_of_the_kernel_for_tiles(
    sequences: int, channels: int, softplus: bool, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Instructions a token: gate and softplus once a (token, channel), no spill, and no load but into shared memory."""
    compiled, shape = compile_launch(sequences, channels, softplus, monkeypatch)
    steps, lanes = shape["STEPS"], shape["LANES"]
    assert stack_bytes(compiled, tmp_path) == 0
    loop = loop_of(compiled.asm["cubin"], tmp_path)
    names = names_of(loop)
    once = 2 * softplus + 2  # a softplus and a gate are two each
    assert names.count("MUFU") == steps * 16 // lanes + steps * once // lanes
    assert names.count("SHFL") == steps * (lanes // 2)  # the sum over lanes, and nothing else
    assert names.count("BAR") <= 3
    assert names.count("LDGSTS") <= 7
    assert not {"LDG", "LDL", "STL"} & {*names}
    assert len(loop) / steps <= most


def test_choice() -> None:
    """The more sequences, the fewer lanes a channel."""
    from tp_mamba.kernels.selective_scan.any import tiles_launch

    def chosen(sequences: int, channels: int, n: int = 16, softplus: bool = False) -> tuple[int, int]:
        shape = tiles_launch(sequences, channels, n, softplus)
        return shape["LANES"], shape["STEPS"]

    assert [chosen(s, 8192) for s in (1, 2, 4, 16)] == [(2, 16), (2, 16), (1, 4), (1, 4)]
    assert [chosen(s, 4096) for s in (1, 2, 4, 64)] == [(4, 16), (2, 16), (2, 16), (1, 4)]
    assert chosen(1, 1) == (4, 16)
    assert [chosen(1, 4096, n) for n in (4, 8, 32)] == [(1, 16), (2, 16), (4, 4)]
    assert [chosen(64, 8192, n) for n in (4, 8, 32)] == [(1, 16), (1, 16), (4, 4)]
    assert [chosen(s, 8192, softplus=True) for s in (1, 16)] == [(2, 8), (1, 4)]
    assert chosen(1, 4096, softplus=True) == (4, 16)
