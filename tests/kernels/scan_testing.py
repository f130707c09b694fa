"""What the tests of the scan's launches share."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tp_mamba.kernels.common.device import DeviceProperties
from tp_mamba.kernels.selective_scan.launch import LaunchPlan, plan_of

CUTS = [(4, 16), (4, 8), (2, 16), (2, 4), (1, 4), (4, 1)]
"""Launches of the kernel for a mixer: lanes per channel, tokens per group."""


def scan_module(name: str) -> Any:
    """``mixer`` or ``any`` as the op has it now: ``triton_device`` imports another one for the interpreter."""
    return importlib.import_module(f"tp_mamba.kernels.selective_scan.{name}")


def force_cut(lanes: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel for a mixer have this cut, whatever the shapes."""

    def plan(
        sequences: int, channels: int, n: int, softplus: bool, every: int | None, device: DeviceProperties
    ) -> LaunchPlan:
        return plan_of(sequences, channels, n, lanes, steps, every)

    monkeypatch.setattr(scan_module("mixer"), "mixer_plan", plan)


def force_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel for any layout serve every call."""
    monkeypatch.setattr(scan_module("mixer"), "launch", lambda *_: False)


def loop_of(cubin: bytes, folder: Path, *, innermost: bool = False) -> list[str]:
    """The instructions of a kernel's longest loop, or of the longest without a loop inside, as the machine has them."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
    listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    starts: list[int] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", found[1].strip()))
            back = re.search(r"BRA.*`\((\.L_\S+)\)", found[1])
            if back and back[1] in labels:
                start = labels[back[1]]
                holds_another = any(other >= start for other in starts)
                starts.append(start)
                if len(instructions) - start > len(longest) and not (innermost and holds_another):
                    longest = instructions[start:]
    return longest
