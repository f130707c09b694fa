"""Where a result comes from: hardware, versions, commit and date."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a result is recorded with.

    Args:
        device: where it was measured.
        commit: of the code, for a tree without git's own record of it.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "driver": driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        **source(commit),
    }


def source(commit: str | None = None) -> dict[str, Any]:
    """``commit`` (of the checkout, unless given) and ``dirty``: whether files differ from it; None if unknown.

    Recorded results do not make a tree dirty.
    """
    if commit is not None:
        return {"commit": commit, "dirty": None}
    head = _git("rev-parse", "HEAD")
    changes = _git(
        "status", "--porcelain", "--untracked-files=all", "--", ".", ":(exclude)benchmarks/results"
    )
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def processor() -> str:
    """The name of this machine's processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def driver() -> str | None:
    """The version of NVIDIA's kernel driver, where Linux tells it."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[0] if found else None


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
