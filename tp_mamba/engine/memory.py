"""How many sequences run at a time, and how many prompt tokens a step takes in: what the memory has room for.

All of it is known before a weight is loaded: what the device has free, and, from a model on the meta device, the bytes
of the weights, of a sequence's state and of a token's activations. So a number that is too large is made smaller, and
one line says so, where an allocation would fail later; and a device without room for a single sequence is refused
before anything is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tp_mamba.engine.model import Model
from tp_mamba.engine.params import number
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.quoting import human_bytes

MEMORY_FRACTION = 0.9
"""Part of the free memory that is planned for; the rest is for libraries, fragments and whatever else runs here."""

LEAST_PREFILL_TOKENS = 64
"""Prompt tokens of a step below which memory does not push them."""

_SAMPLING_BYTES = 96
"""Bytes per id of the vocabulary that choosing one row's token takes: logits, float64 copies, a sort, tables of what
was made."""

_CAPTURED_TOKENS = 2048
"""Tokens of the largest step whose activations captured graphs keep for themselves."""

_CAPTURE_BYTES = 2**29
"""Bytes of what captured graphs take besides."""

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class MemoryShortError(ValueError):
    """A device has no room for a single sequence; the message is one sentence with the remedy."""


class ClampedWarning(UserWarning):
    """Fewer sequences run at a time, or fewer prompt tokens a step, than were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What one rank of a model needs, in bytes."""

    weights: int
    """Of its parameters; 0 where they are in memory already."""
    sequence: int
    """Of a sequence: its state, and choosing its token."""
    token: int
    """Of a packed token's activations."""
    captures: bool = False
    """Whether steps are captured, which takes memory where there is some to spare."""

    @classmethod
    def of(cls, model: Model, *, weights: int = 0, captures: bool = False) -> Needs:
        """Those of ``model``, which may be on the meta device."""
        return cls(
            weights=weights,
            sequence=model.bytes_per_slot + _SAMPLING_BYTES * model.config.vocab_size,
            token=model.activation_bytes_per_token,
            captures=captures,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine may take on."""

    max_batch_size: int
    max_prefill_tokens: int
    note: str | None = None
    """One line, where they are below what was asked for."""


def choose_limits(
    needs: Needs,
    free: int | None,
    *,
    max_batch_size: int,
    max_prefill_tokens: int,
    fraction: float,
    where: str,
) -> Limits:
    """What fits of ``max_batch_size`` sequences at a time and ``max_prefill_tokens`` prompt tokens a step.

    Activations may take half of the room, and more where all sequences fit beside them. A number is made smaller, never
    refused, unless ``needs.weights`` are still to be loaded and leave no room for one sequence.

    Args:
        free: bytes that this rank may count on; None if nobody knows, and then everything is taken to fit.
        fraction: part of them that is planned for.
        where: the device and what is free there, for the sentences.

    Raises:
        MemoryShortError: there is too little for the weights and one sequence.
    """
    if free is None:
        return Limits(max_batch_size, max_prefill_tokens)
    each, least = needs.sequence + needs.token, min(max_prefill_tokens, LEAST_PREFILL_TOKENS)
    room = int(free * fraction) - needs.weights
    if needs.weights and room < each + least * needs.token:
        needed = human_bytes(needs.weights + each + least * needs.token)
        raise MemoryShortError(
            f"{where}, a fraction of {fraction:g} of it may be used, and {human_bytes(needs.weights)} of weights with "
            f"one sequence take {needed}: use more ranks, a narrower dtype, or a device with more memory"
        )
    for_activations = max(room // 2, room - max_batch_size * each)
    prefill_tokens = max(least, min(max_prefill_tokens, for_activations // max(1, needs.token)))
    room -= prefill_tokens * needs.token
    if needs.captures:
        captured = min(_CAPTURED_TOKENS, prefill_tokens) * needs.token + _CAPTURE_BYTES
        room -= min(captured, room // 2)
    batch_size = max(1, min(max_batch_size, room // each))
    lowered = [
        f"{chosen:,} instead of {asked:,} {what}"
        for chosen, asked, what in (
            (batch_size, max_batch_size, "sequences run at a time"),
            (prefill_tokens, max_prefill_tokens, "prompt tokens are taken in a step"),
        )
        if chosen < asked
    ]
    note = None
    if lowered:
        loaded = f", {human_bytes(needs.weights)} of it for weights" if needs.weights else ""
        note = f"{' and '.join(lowered)}: {where}, and a fraction of {fraction:g} of it is used{loaded}"
    return Limits(batch_size, prefill_tokens, note)


def agree_on_limits(
    tp: TensorParallel,
    needs: Needs,
    *,
    device: torch.device,
    max_batch_size: int,
    max_prefill_tokens: int,
    fraction: float,
) -> Limits:
    """:func:`choose_limits` for the rank with the least free memory; every rank calls this, and gets the same.

    Args:
        device: where the model is, or will be.

    Raises:
        MemoryShortError: on every rank.
    """
    every: Sequence[int | None] = tp.all_gather_object(free_memory(device))
    known = [(free, rank) for rank, free in enumerate(every) if free is not None]
    free, rank = min(known, default=(None, 0))
    where = ""
    if free is not None:
        # On a CPU all ranks are taken to share one host.
        sharing = tp.size if device.type == "cpu" else 1
        shared = f" for each of {sharing} ranks" if sharing > 1 else ""
        free //= sharing
        place = "the CPU's memory" if device.type == "cpu" else f"the GPU of rank {rank}"
        where = f"{place} has {human_bytes(free)} free{shared}"
    return choose_limits(
        needs,
        free,
        max_batch_size=max_batch_size,
        max_prefill_tokens=max_prefill_tokens,
        fraction=fraction,
        where=where,
    )


def checked_fraction(fraction: float) -> float:
    """``fraction`` as a float above 0 and at most 1.

    Raises:
        ValueError: it is none.
    """
    if not 0 < number("memory_fraction", fraction) <= 1:
        raise ValueError(f"memory_fraction={fraction} is out of range: it lies above 0 and at most at 1")
    return float(fraction)


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
        left = int(limit.read_text()) - int(usage.read_text())
    except (OSError, ValueError):
        return None
    return max(0, left + _file_cache(usage.with_name("memory.stat")))


def _file_cache(stat: Path) -> int:
    """Bytes of files that a control group keeps in memory for as long as nobody else wants it: a checkpoint that was
    downloaded just now, for example."""
    try:
        counts = dict(line.split()[:2] for line in stat.read_text().splitlines())
        return int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0
