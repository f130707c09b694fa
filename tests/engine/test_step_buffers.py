"""What of a step lies in the buffers, padding included, and that wrong indices are seen before a step runs."""

import dataclasses
from typing import Any

import pytest
import torch

from tp_mamba.batch import NULL_SLOT
from tp_mamba.engine.buffers import StepBuffers, StepInputs, StepTensors, TokenReturn
from tp_mamba.engine.checks import check_step, check_tensors
from tp_mamba.engine.ladder import Rung
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.scheduler import Chunk, Schedule

SLOTS, VOCABULARY = 6, 50
STEP = StepInputs(
    decode_slots=[4, 1],
    prefill_slots=[0, 3],
    prefill_lengths=[3, 2],
    continues=[False, True],
    places=[54, 51, 7, 8, 9, 20, 21],
    wanted=[0, 1, 4],
    answers=[54, 51, 50],
)


def buffers() -> StepBuffers:
    made = StepBuffers(SLOTS, 20, VOCABULARY, torch.device("cpu"))
    # What was there before must not show through.
    full = StepInputs([5, 4, 3, 2, 1, 0], [], [], [], [49] * 26, [9] * 6, [55] * 6)
    made.fill(full)
    made.fill(StepInputs([], [5, 4, 3, 2, 1, 0], [4] * 6, [True] * 6, [49] * 26, [9] * 6, [55] * 6))
    return made


def listed(tensors: StepTensors) -> dict[str, Any]:
    batch = tensors.metadata
    return {
        "decode": batch.decode_state_indices.tolist(),
        "starts": batch.prefill_query_start_loc.tolist(),
        "slots": batch.prefill_state_indices.tolist(),
        "continues": batch.prefill_has_initial_states.tolist(),
        "places": tensors.places.tolist(),
        "wanted": tensors.wanted.tolist(),
        "answers": tensors.answers.tolist(),
    }


def test_a_step_as_it_is() -> None:
    tensors = buffers().fill(STEP)
    assert (tensors.metadata.num_decodes, tensors.metadata.num_padded_decodes) == (2, 2)
    assert (tensors.metadata.num_prefills, tensors.metadata.num_prefill_tokens) == (2, 5)
    assert listed(tensors) == {
        "decode": [4, 1],
        "starts": [0, 3, 5],
        "slots": [0, 3],
        "continues": [False, True],
        "places": STEP.places,
        "wanted": STEP.wanted,
        "answers": STEP.answers,
    }


def test_decode_rows_of_a_padded_mixed_step_continue_their_states_as_prompts() -> None:
    made = buffers()
    tensors = made.fill(STEP, Rung(12, 6, decodes=False))
    assert (tensors.metadata.num_padded_decodes, tensors.metadata.num_prefills) == (0, 6)
    assert tensors.metadata.num_prefill_tokens == 12
    assert listed(tensors) == {
        "decode": [],
        "starts": [0, 1, 2, 5, 7, 7, 7],
        "slots": [4, 1, 0, 3, NULL_SLOT, NULL_SLOT],
        "continues": [True, True, False, True, False, False],
        "places": [*STEP.places, 0, 0, 0, 0, 0],
        "wanted": [0, 1, 4, 0, 0, 0],
        "answers": [54, 51, 50, made.sink, made.sink, made.sink],
    }
    check_tensors(tensors, SLOTS, VOCABULARY)


def test_a_padded_decode_step() -> None:
    made = buffers()
    step = StepInputs(decode_slots=[4, 1], places=[54, 51], wanted=[0, 1], answers=[54, 51])
    tensors = made.fill(step, Rung(4, 4, decodes=True))
    assert (tensors.metadata.num_padded_decodes, tensors.metadata.num_prefills) == (4, 0)
    found = listed(tensors)
    assert found["decode"] == [4, 1, NULL_SLOT, NULL_SLOT]
    assert found["places"] == [54, 51, 0, 0]
    assert found["wanted"] == [0, 1, 0, 0]
    assert found["answers"] == [54, 51, made.sink, made.sink]
    check_tensors(tensors, SLOTS, VOCABULARY)


def test_a_step_of_padding_alone() -> None:
    made = buffers()
    for rung in (Rung(9, 3, decodes=False), Rung(3, 3, decodes=True)):
        tensors = made.fill(StepInputs(), rung)
        check_tensors(tensors, SLOTS, VOCABULARY)
        assert set(listed(tensors)["decode" if rung.decodes else "slots"]) == {NULL_SLOT}
        assert set(tensors.answers.tolist()) == {made.sink}


@pytest.mark.parametrize("rung", [None, Rung(26, 6, decodes=False)])
def test_fields_begin_where_triton_compiles_the_same_kernels(rung: Rung | None) -> None:
    tensors = buffers().fill(STEP, rung)
    batch = tensors.metadata
    for tensor in (
        batch.prefill_query_start_loc,
        batch.prefill_state_indices,
        batch.prefill_has_initial_states,
        batch.decode_state_indices,
        tensors.places,
        tensors.wanted,
        tensors.answers,
    ):
        assert not tensor.numel() or tensor.data_ptr() % 16 == 0


def test_ids_are_looked_up_in_one_table() -> None:
    made = buffers()
    assert made.table[:VOCABULARY].tolist() == list(range(VOCABULARY))
    made.table[made.place_of_slot(4)] = 33
    assert made.table[torch.tensor(STEP.places)].tolist() == [33, 0, 7, 8, 9, 20, 21]
    assert made.sink == len(made.table) - 1


def test_tokens_come_back_in_order() -> None:
    back = TokenReturn(4, torch.device("cpu"))
    first, second = back.send(torch.tensor([3, 1])), back.send(torch.tensor([5]))
    assert (first(), second()) == ([3, 1], [5])


@pytest.mark.gpu
def test_buffers_of_a_gpu_are_not_overwritten_while_they_are_read() -> None:
    """The device is busy, so that copies queue up behind one another, and the host runs as far ahead as it may."""
    device = torch.device("cuda", torch.cuda.current_device())
    made, back = StepBuffers(SLOTS, 4096, VOCABULARY, device), TokenReturn(SLOTS, device)
    busy = torch.zeros(4096, 4096, device=device)
    sums, answers = [], []
    for i in range(40):
        for _ in range(5):
            busy = busy @ busy
        step = StepInputs([], [0], [4000], [False], [i] * 4000, [3999], [50])
        tensors = made.fill(step, Rung(4096, 1, decodes=False) if i % 2 else None)
        sums.append(made.table.index_select(0, tensors.places).sum())
        answers.append(back.send(sums[-1][None]))
        if i >= 2:
            assert answers[i - 2]() == [(i - 2) * 4000]
    assert [int(each) for each in sums] == [i * 4000 for i in range(40)]


def schedule() -> Schedule:
    lengths = [1, 1, 3, 7]
    made = [Request(i, [7, 8, 9, 20, 21, 22, 23][:n], SamplingParams()) for i, n in enumerate(lengths)]
    for request, slot in zip(made, (4, 1, 0, 3), strict=True):
        request.slot = slot
    return Schedule(made[:2], [Chunk(made[2], 0, 3), Chunk(made[3], 3, 2)], [])


WRONG = {
    "out of range": {"decode_slots": [6, 1]},
    "is not that of request 0": {"decode_slots": [2, 1]},
    "given to two rows": {"decode_slots": [1, 1]},
    "2 decode rows and lengths": {"prefill_lengths": [3, 1]},
    "lengths \\[0": {"prefill_lengths": [0, 5]},
    "reads place 53": {"places": [53, 51, 7, 8, 9, 20, 21]},
    "holds the id 50": {"places": [54, 51, 7, 50, 9, 20, 21]},
    "holds the id -1": {"places": [54, 51, -1, 8, 9, 20, 21]},
    "logits of tokens": {"wanted": [0, 1, 3]},
    "the next tokens go to": {"answers": [54, 51, 53]},
    "4 rows for 3": {"prefill_slots": [0]},
}


def test_a_step_that_fits_its_requests_passes() -> None:
    check_step(STEP, schedule(), SLOTS, VOCABULARY)
    ended = schedule()
    ended.decodes[1].finish_reason = "eos"
    with pytest.raises(RuntimeError, match="request 1 has ended"):
        check_step(STEP, ended, SLOTS, VOCABULARY)


@pytest.mark.parametrize("message", WRONG)
def test_a_step_that_does_not_is_refused(message: str) -> None:
    found = {"out of range": "slot 6 of request 0 is none of 6", "4 rows for 3": "3 rows for 4 requests"}
    given, wrong = schedule(), dataclasses.replace(STEP, **WRONG[message])
    if message == "given to two rows":
        given.decodes[0].slot = 1
    with pytest.raises(RuntimeError, match=found.get(message, message)):
        check_step(wrong, given, SLOTS, VOCABULARY)


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("slots", 1, 6, "there are 6"),
        ("slots", 1, -2, "there are 6"),
        ("slots", 4, 0, "lies in the buffer twice"),
        ("starts", 1, 6, "pieces start at"),
        ("starts", 6, 13, "of 12 tokens"),
        ("starts", 0, 1, "pieces start at"),
        ("places", 11, 57, "ids are read from places"),
        ("places", 3, -1, "ids are read from places"),
        ("wanted", 5, 12, "logits of tokens"),
        ("answers", 5, 49, "tokens go to places"),
        ("answers", 5, 57, "tokens go to places"),
    ],
)
def test_what_lies_in_the_buffer_is_looked_at(field: str, at: int, value: int, message: str) -> None:
    made = buffers()
    tensors = made.fill(STEP, Rung(12, 6, decodes=False))
    check_tensors(tensors, SLOTS, VOCABULARY)
    of = {
        "slots": tensors.metadata.prefill_state_indices,
        "starts": tensors.metadata.prefill_query_start_loc,
        "places": tensors.places,
        "wanted": tensors.wanted,
        "answers": tensors.answers,
    }
    of[field][at] = value
    with pytest.raises(RuntimeError, match=message):
        check_tensors(tensors, SLOTS, VOCABULARY)
