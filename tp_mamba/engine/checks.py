"""A debug check of every index of a step, before anything of it is launched.

A captured step reads whatever its indices say. A wrong one shows as wrong text, hardly ever as an error, and some steps
later.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from tp_mamba.batch import NULL_SLOT
from tp_mamba.engine.buffers import StepInputs, StepTensors
from tp_mamba.engine.scheduler import Schedule


def check_step(step: StepInputs, schedule: Schedule, slots: int, vocab_size: int) -> None:
    """Compare ``step`` with the requests of ``schedule``, for a cache of ``slots`` and ids below ``vocab_size``.

    Raises:
        RuntimeError: an index is out of range, belongs to another request, or occurs twice; or the lengths do not fit
            the tokens.
    """
    rows = step.decode_slots + step.prefill_slots
    owners = schedule.decodes + [chunk.request for chunk in schedule.chunks]
    _require(
        len(rows) == len(owners) <= slots, f"{len(rows)} rows for {len(owners)} requests in {slots} slots"
    )
    for slot, request in zip(rows, owners, strict=True):
        _require(0 <= slot < slots, f"slot {slot} of request {request.index} is none of {slots}")
        _require(request.slot == slot, f"slot {slot} is not that of request {request.index}, {request.slot}")
        _require(request.finish_reason is None, f"request {request.index} has ended")
    _require(len(set(rows)) == len(rows), f"a slot is given to two rows: {sorted(rows)}")
    decodes = len(step.decode_slots)
    _require(
        len(step.prefill_slots) == len(step.prefill_lengths) == len(step.continues),
        f"{len(step.prefill_slots)} slots, {len(step.prefill_lengths)} lengths and {len(step.continues)} continuations",
    )
    _require(all(length > 0 for length in step.prefill_lengths), f"lengths {step.prefill_lengths}")
    _require(
        decodes + sum(step.prefill_lengths) == step.num_tokens,
        f"{decodes} decode rows and lengths {step.prefill_lengths} for {step.num_tokens} tokens",
    )
    for place, slot in zip(step.places, step.decode_slots, strict=False):
        _require(place == vocab_size + slot, f"a decode row of slot {slot} reads place {place} of the table")
    for place in step.places[decodes:]:
        _require(0 <= place < vocab_size, f"a prompt holds the id {place}, there are {vocab_size}")
    ends = list(range(decodes))
    at = decodes
    for chunk, length in zip(schedule.chunks, step.prefill_lengths, strict=True):
        at += length
        if chunk.answers:
            ends.append(at - 1)
    _require(step.wanted == ends, f"logits of tokens {step.wanted} are asked for, not {ends}")
    answers = [vocab_size + (request.slot or 0) for request in schedule.sampling]
    _require(step.answers == answers, f"the next tokens go to {step.answers}, not {answers}")


def check_tensors(step: StepTensors, slots: int, vocab_size: int) -> None:
    """Look at what lies in the device's buffer, padding included, and so wait for it.

    Raises:
        RuntimeError: an index that the step will follow is out of range, or a slot is there twice.
    """
    batch = step.metadata
    rows = [*_values(batch.decode_state_indices), *_values(batch.prefill_state_indices)]
    used = [slot for slot in rows if slot != NULL_SLOT]
    _require(all(0 <= slot < slots for slot in used), f"slots {rows} lie in the buffer, there are {slots}")
    _require(len(set(used)) == len(used), f"a slot lies in the buffer twice: {sorted(used)}")
    starts = batch.prefill_query_start_loc.tolist()
    rising = all(first <= second for first, second in pairwise(starts))
    if batch.num_prefills:
        _require(
            starts[0] == 0 and rising and starts[-1] <= batch.num_prefill_tokens,
            f"pieces start at {starts} of {batch.num_prefill_tokens} tokens",
        )
    places, wanted, answers = step.places.tolist(), step.wanted.tolist(), step.answers.tolist()
    _require(all(0 <= place < vocab_size + slots for place in places), f"ids are read from places {places}")
    _require(all(0 <= token < len(places) for token in wanted), f"logits of tokens {wanted} of {len(places)}")
    _require(
        all(vocab_size <= place <= vocab_size + slots for place in answers), f"tokens go to places {answers}"
    )


def _values(tensor: torch.Tensor | None) -> list[int]:
    return [] if tensor is None else tensor.tolist()


def _require(holds: bool, wrong: str) -> None:
    if not holds:
        raise RuntimeError(
            f"a step does not fit its requests: {wrong}; this is a bug of the engine, please report it"
        )
