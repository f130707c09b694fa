"""How many sequences fit at a time."""

from __future__ import annotations

from pathlib import Path

import torch

_SHARE = 0.5
"""Part of the free memory that sequences may take; the rest is for activations and whatever else runs here."""

_SAMPLING_BYTES = 64
"""Bytes per id of the vocabulary that choosing one row's token takes: logits, float64 copies, a sort."""

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def fitting_batch(device: torch.device, bytes_per_slot: int, vocab_size: int, ranks: int) -> int | None:
    """Sequences whose states, and whose sampling, take at most half of the memory that is free on ``device``.

    On a CPU all ``ranks`` are taken to share one host.

    Returns:
        At least 1; None where the system does not say what is free.
    """
    free = free_memory(device)
    if free is None:
        return None
    sharing = ranks if device.type == "cpu" else 1
    return max(1, int(free * _SHARE) // (sharing * (bytes_per_slot + _SAMPLING_BYTES * vocab_size)))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, those that torch holds and does not use included.

    On a CPU this is what Linux calls available, within the limit of the container; None where neither is known.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limits = [_available()] + [_headroom(Path(limit), Path(usage)) for limit, usage in _CGROUPS]
    return min((limit for limit in limits if limit is not None), default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _headroom(limit: Path, usage: Path) -> int | None:
    """What a control group may still take; None if it is not limited (its file then says ``max``)."""
    try:
        return max(0, int(limit.read_text()) - int(usage.read_text()))
    except (OSError, ValueError):
        return None
