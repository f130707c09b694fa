"""The engine itself: requests that come and go, each with parameters of its own, and those that fail."""

import threading

import pytest
from toy_model import ToyModel, prompts_of

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.generate import generate, stream
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import TokenEvent

SETTINGS = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=12, temperature=0.8, seed=3),
    SamplingParams(max_new_tokens=9, temperature=1.4, top_k=5, seed=3),
    SamplingParams(max_new_tokens=12, repetition_penalty=1.5),
    SamplingParams(max_new_tokens=12, temperature=1.1, top_p=0.8, min_p=0.02, repetition_penalty=1.2),
    SamplingParams(max_new_tokens=12, temperature=0.8, min_p=0.2, seed=2**64 - 1),
]


def drain(engine: Engine) -> dict[int, list[TokenEvent]]:
    """Every event that is still to come, by request."""
    events: dict[int, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.index, []).append(event)
    return events


def ids_of(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


def test_prompts_with_different_parameters_run_together_as_each_would_alone() -> None:
    model, prompts = ToyModel(usable=37), prompts_of([3, 1, 9, 5, 2, 14])
    together = generate(model, prompts, SETTINGS)
    assert max(batch.num_decodes for batch in model.passes) == len(prompts)
    for index, (prompt, params) in enumerate(zip(prompts, SETTINGS, strict=True)):
        with Engine(ToyModel(usable=37)) as engine:
            engine.add_request(prompt, params, position=index)
            assert ids_of(drain(engine)[0]) == together[index].token_ids
    assert len({tuple(result.token_ids) for result in together}) == len(prompts)


def test_requests_come_while_others_run_and_change_nothing_for_them() -> None:
    model, (first, second, third) = ToyModel(), prompts_of([4, 6, 2])
    alone = [result.token_ids for result in generate(model, [first, second, third], max_new_tokens=8)]
    with Engine(ToyModel(), max_batch_size=2) as engine:
        params = SamplingParams(max_new_tokens=8)
        assert engine.add_request(first, params) == 0
        events = engine.step() + engine.step()
        assert engine.add_request(second, params) == 1
        assert engine.add_request(third, params) == 2
        rest = drain(engine)
        assert ids_of(events + rest[0]) == alone[0]
        assert [ids_of(rest[1]), ids_of(rest[2])] == alone[1:]
        assert not engine.has_work
        assert engine.step() == []


def test_an_aborted_request_makes_no_more_events_and_frees_its_slot() -> None:
    model, prompts = ToyModel(), prompts_of([3, 20, 2, 4])
    alone = generate(ToyModel(), prompts, max_new_tokens=6)
    with Engine(model, max_batch_size=2, max_prefill_tokens=8) as engine:
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(max_new_tokens=6))
        events = engine.step()
        assert engine.abort(1), "it is being taken in"
        assert engine.abort(2), "it is waiting"
        assert not engine.abort(1)
        assert not engine.abort(99)
        assert len(model.caches[0].used) == 1
        rest = drain(engine)
        assert rest.keys() == {0, 3}
        assert ids_of(events + rest[0]) == alone[0].token_ids
        assert ids_of(rest[3]) == alone[3].token_ids
        assert not engine.abort(0), "it has ended"


def test_a_request_whose_logits_are_not_finite_ends_alone() -> None:
    model, prompts = ToyModel(), prompts_of([3, 4, 5])
    expected = generate(model, prompts, max_new_tokens=9)
    for settings in (SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=9, temperature=1e-6)):
        model.spoils = None
        events = stream(model, prompts, settings)
        before = [next(events) for _ in range(6)]
        model.spoils = lambda number, slot: slot == 1
        after = list(events)
        failed = [event for event in after if event.index == 1]
        assert [(event.token_id, event.finish_reason) for event in failed] == [(None, "error")]
        assert failed[0].error.startswith("the logits of new token 2 are not finite, so the weights are dam")
        for index in (0, 2):
            assert ids_of([e for e in before + after if e.index == index]) == expected[index].token_ids, (
                "tokens of the same step, and of later ones, are there"
            )
        assert not model.caches[-1].used


def test_generate_returns_what_a_failed_sequence_made_before() -> None:
    model, prompts = ToyModel(), prompts_of([3, 4])
    expected = generate(model, prompts, max_new_tokens=5)
    model.passes.clear()
    model.spoils = lambda number, slot: slot == 0 and number == 4
    failed, other = generate(model, prompts, max_new_tokens=5)
    assert failed.token_ids == expected[0].token_ids[:3]
    assert failed.finish_reason == "error"
    assert failed.error.startswith("the logits of new token 3 are not finite")
    assert other == expected[1]


def test_a_closed_engine_is_refused_and_a_position_out_of_range() -> None:
    engine = Engine(ToyModel())
    with pytest.raises(ValueError, match="position=-1 is out of range"):
        engine.add_request([1], position=-1)
    engine.add_request([1])
    engine.close()
    engine.close()
    assert not engine.has_work
    for call in (lambda: engine.add_request([1]), engine.step, engine.start):
        with pytest.raises(ValueError, match="this engine is closed: make a new one"):
            call()


def test_events_of_one_stream_may_be_taken_by_another_thread() -> None:
    events, taken = stream(ToyModel(), prompts_of([3]), max_new_tokens=4), []
    thread = threading.Thread(target=lambda: taken.extend(events))
    thread.start()
    thread.join()
    assert [event.finish_reason for event in taken] == [None, None, None, "length"]
