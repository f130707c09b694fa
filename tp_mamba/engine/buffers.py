"""The inputs of a step, in memory that stays where it is, and its tokens on their way back to the host.

A captured step reads its inputs where they lay when it was captured. So there is one buffer on the device, in which
every field has its place, and each step fills it by one copy from pinned memory; nothing waits for the copy.

The ids of a step are places in a table ``[V + slots + 1]`` on the device. Place ``i < V`` holds ``i``; place ``V + s``
holds the last token of the sequence in slot ``s``, which sampling writes there. So a decode step starts from tokens
that the host has not seen yet, one lookup serves prompts and decode rows alike, and whatever is in the table is an id
of the vocabulary. The last place takes what rows of padding write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from tp_mamba.batch import NULL_SLOT, MambaMetadata
from tp_mamba.engine.ladder import Rung

_ALIGNMENT = 16
"""Every field begins on a multiple of this many bytes: Triton compiles other kernels for pointers that do not."""

_STAGES = 3
"""Host buffers: one that the device reads from, one behind it, and one that is being filled."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, as the host describes it; decode rows first, then pieces of prompts."""

    decode_slots: list[int] = field(default_factory=list)
    prefill_slots: list[int] = field(default_factory=list)
    prefill_lengths: list[int] = field(default_factory=list)
    continues: list[bool] = field(default_factory=list)
    """Of each piece: whether it goes on from the state in its slot."""
    places: list[int] = field(default_factory=list)
    """Of each token: where its id lies in the table."""
    wanted: list[int] = field(default_factory=list)
    """Tokens whose logits are asked for."""
    answers: list[int] = field(default_factory=list)
    """Of each of those: the place in the table that takes the next token."""

    @property
    def num_tokens(self) -> int:
        """Tokens, not counting padding."""
        return len(self.places)

    @property
    def num_sequences(self) -> int:
        """Rows, not counting padding."""
        return len(self.decode_slots) + len(self.prefill_slots)

    @property
    def only_decodes(self) -> bool:
        """Whether no prompt is taken in."""
        return not self.prefill_slots


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step, as the model takes it: views of the device's buffer."""

    places: torch.Tensor
    """``[T]`` int64"""
    metadata: MambaMetadata
    wanted: torch.Tensor
    """``[B]`` int64"""
    answers: torch.Tensor
    """``[B]`` int64"""


class StepBuffers:
    """Where the inputs of steps lie, at most ``slots`` rows and ``slots + max_prefill_tokens`` tokens.

    Attributes:
        table: ``[V + slots + 1]`` int64, see the top of this module.
        sink: the place in it that padding writes to.
    """

    def __init__(self, slots: int, max_prefill_tokens: int, vocab_size: int, device: torch.device) -> None:
        self._slots, self._vocab_size, self._device = slots, vocab_size, device
        self.sink = vocab_size + slots
        self.table = torch.arange(self.sink + 1, device=device)
        self.table[vocab_size:] = 0
        fields = {  # the ids are the last, so that a step copies no more of them than it has
            "decode_slots": (np.int32, slots),
            "starts": (np.int32, slots + 1),
            "slots": (np.int32, slots),
            "continues": (np.bool_, slots),
            "wanted": (np.int64, slots),
            "answers": (np.int64, slots),
            "places": (np.int64, slots + max_prefill_tokens),
        }
        sizes = [
            -(-np.dtype(dtype).itemsize * count // _ALIGNMENT) * _ALIGNMENT
            for dtype, count in fields.values()
        ]
        offsets = list(accumulate(sizes, initial=0))
        self._places_at = offsets[-2]
        on_gpu = device.type == "cuda"
        stages = [
            torch.zeros(offsets[-1], dtype=torch.uint8, pin_memory=on_gpu)
            for _ in range(_STAGES if on_gpu else 1)
        ]
        # A CPU reads what the host wrote.
        self._buffer = torch.zeros_like(stages[0], device=device) if on_gpu else stages[0]
        self._stages = [_Stage(stage, fields, offsets) for stage in stages]
        self._turn = 0
        self._fields = {
            name: self._buffer[at : at + np.dtype(dtype).itemsize * count].view(_TORCH_DTYPES[dtype])
            for (name, (dtype, count)), at in zip(fields.items(), offsets, strict=False)
        }

    def place_of_slot(self, slot: int) -> int:
        """Where in the table the last token of ``slot`` lies."""
        return self._vocab_size + slot

    def fill(self, step: StepInputs, rung: Rung | None = None) -> StepTensors:
        """Put ``step`` into the device's buffer, behind what is queued there; padded to ``rung`` if there is one.

        With a rung of a mixed step, decode rows become pieces of one token that continue a state.
        """
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % len(self._stages)
        stage.wait()
        if rung is None:
            stage.write(step)
            tensors = self._views(
                len(step.decode_slots), len(step.prefill_slots), step.num_tokens, len(step.wanted)
            )
        else:
            stage.write_padded(step, rung, self.sink)
            tensors = self.views(rung)
        if stage.memory is not self._buffer:
            end = self._places_at + 8 * len(tensors.places)
            self._buffer[:end].copy_(stage.memory[:end], non_blocking=True)
            stage.sent()
        return tensors

    def views(self, rung: Rung) -> StepTensors:
        """The views of a step that is padded to ``rung``."""
        if rung.decodes:
            return self._views(rung.sequences, 0, rung.sequences, rung.sequences)
        return self._views(0, rung.sequences, rung.tokens, rung.sequences)

    def _views(self, decodes: int, prefills: int, tokens: int, wanted: int) -> StepTensors:
        fields = self._fields
        metadata = MambaMetadata(
            num_decodes=decodes,
            num_padded_decodes=decodes,
            num_prefills=prefills,
            num_prefill_tokens=tokens - decodes,
            max_slot=self._slots - 1,
            decode_state_indices=fields["decode_slots"][:decodes],
            prefill_query_start_loc=fields["starts"][: prefills + 1],
            prefill_has_initial_states=fields["continues"][:prefills],
            prefill_state_indices=fields["slots"][:prefills],
        )
        return StepTensors(
            fields["places"][:tokens], metadata, fields["wanted"][:wanted], fields["answers"][:wanted]
        )


_TORCH_DTYPES: dict[Any, torch.dtype] = {np.bool_: torch.bool, np.int32: torch.int32, np.int64: torch.int64}


class _Stage:
    """One host buffer and the copy that reads from it."""

    def __init__(self, memory: torch.Tensor, fields: dict[str, tuple[Any, int]], offsets: list[int]) -> None:
        self.memory = memory
        whole = memory.numpy()
        self._fields = {
            name: whole[at : at + np.dtype(dtype).itemsize * count].view(dtype)
            for (name, (dtype, count)), at in zip(fields.items(), offsets, strict=False)
        }
        self._copied = torch.cuda.Event() if memory.is_pinned() else None

    def wait(self) -> None:
        """Return once the device has read what was last sent."""
        if self._copied is not None:
            self._copied.synchronize()

    def sent(self) -> None:
        """A copy of it was just queued."""
        if self._copied is not None:
            self._copied.record()

    def write(self, step: StepInputs) -> None:
        """``step`` as it is."""
        _put(self._fields["decode_slots"], step.decode_slots)
        self._write_prefills(step.prefill_slots, step.prefill_lengths, step.continues)
        self._write_tokens(step)

    def write_padded(self, step: StepInputs, rung: Rung, sink: int) -> None:
        """``step`` and what fills ``rung`` up: rows at the null slot, empty ones of a mixed step, and any tokens."""
        decodes = len(step.decode_slots)
        if rung.decodes:
            _put(self._fields["decode_slots"], step.decode_slots, rung.sequences, NULL_SLOT)
        else:
            padding = rung.sequences - step.num_sequences
            self._write_prefills(
                step.decode_slots + step.prefill_slots + [NULL_SLOT] * padding,
                [1] * decodes + step.prefill_lengths + [0] * padding,
                [True] * decodes + step.continues + [False] * padding,
            )
        self._write_tokens(step)
        wanted = len(step.wanted)
        self._fields["wanted"][wanted : rung.sequences] = 0
        self._fields["answers"][wanted : rung.sequences] = sink
        self._fields["places"][step.num_tokens : rung.tokens] = 0

    def _write_prefills(self, slots: list[int], lengths: list[int], continues: list[bool]) -> None:
        _put(self._fields["starts"], list(accumulate(lengths, initial=0)))
        _put(self._fields["slots"], slots)
        _put(self._fields["continues"], continues)

    def _write_tokens(self, step: StepInputs) -> None:
        _put(self._fields["wanted"], step.wanted)
        _put(self._fields["answers"], step.answers)
        _put(self._fields["places"], step.places)


def _put(to: np.ndarray, values: list[Any], size: int | None = None, rest: int = 0) -> None:
    """``values`` to the beginning of ``to``, ``rest`` behind them up to ``size``."""
    to[: len(values)] = values
    if size is not None:
        to[len(values) : size] = rest


def to_host(values: torch.Tensor) -> Callable[[], list[Any]]:
    """Queue the way of ``values`` to the host; what is returned waits for them, and gives them as lists."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def receive() -> list[Any]:
        arrived.synchronize()
        return host.tolist()

    return receive


class TokenReturn:
    """Brings the tokens of steps back to the host, while the device goes on."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots = slots
        self._ring: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            self._ring = [
                (torch.zeros(slots, dtype=torch.int64, pin_memory=True), torch.cuda.Event())
                for _ in range(_STAGES)
            ]
        self._turn = 0

    def send(self, tokens: torch.Tensor) -> Callable[[], list[int]]:
        """Queue the way back of ``tokens [B]``; what is returned waits for them, and is called before the third next
        :meth:`send`."""
        if not self._ring:
            return tokens.tolist
        host, arrived = self._ring[self._turn]
        self._turn = (self._turn + 1) % len(self._ring)
        host = host[: len(tokens)]
        host.copy_(tokens, non_blocking=True)
        arrived.record()

        def receive() -> list[int]:
            arrived.synchronize()
            return host.tolist()

        return receive
