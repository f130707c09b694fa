"""The host one step behind: the same events as in step, and nothing lost when requests come, fail and go."""

import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_engine import SETTINGS, drain, ids_of
from test_generate_engine import tokenizer_of_letters
from toy_model import ToyModel, prompts_of

from tp_mamba.batch import MambaMetadata
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.generate import generate, stream
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request, TokenEvent
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.state.slots import SlotPool

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])


def by_request(events: list[TokenEvent]) -> dict[int, list[TokenEvent]]:
    found: dict[int, list[TokenEvent]] = {}
    for event in events:
        found.setdefault(event.index, []).append(event)
    return found


@pytest.mark.parametrize(
    "limits", [{}, {"max_batch_size": 2}, {"max_batch_size": 3, "max_prefill_tokens": 5}], ids=str
)
def test_events_are_those_of_working_in_step(limits: dict[str, int]) -> None:
    tokenizer, prompts = tokenizer_of_letters(), prompts_of([3, 1, 9, 5, 2, 14, 4])
    free = generate(ToyModel(), prompts, SETTINGS + SETTINGS[1:2], tokenizer)
    ends = [{}] * 7
    ends[1] = {"stop_token_ids": (free[1].token_ids[4],)}
    ends[2] = {"stop": (free[2].text[2:4],)}
    ends[4] = {"stop_token_ids": (free[4].token_ids[0],)}  # ends with its first token
    settings = [
        SamplingParams(**{name: getattr(p, name) for name in SamplingParams.__dataclass_fields__} | end)
        for p, end in zip(SETTINGS + SETTINGS[1:2], ends, strict=True)
    ]
    model = ToyModel()
    expected = list(stream(model, prompts, settings, tokenizer, overlap=False, **limits))
    events = list(stream(model, prompts, settings, tokenizer, overlap=True, **limits))
    assert by_request(events) == by_request(expected)
    assert {e.finish_reason for e in events} == {None, "stop", "length"}
    assert not model.caches[-1].used


def test_the_next_step_is_launched_before_the_tokens_of_this_one_are_asked_for() -> None:
    model = ToyModel()
    events = stream(model, prompts_of([3, 5]), SamplingParams(max_new_tokens=4), overlap=True)
    passes = []
    for _ in events:
        passes.append(len(model.passes))
    assert passes == [2, 2, 3, 3, 4, 4, 4, 4]


def test_a_length_that_is_known_in_advance_wastes_no_step() -> None:
    model, other = ToyModel(), ToyModel()
    prompts, settings = prompts_of([3, 1, 9, 5]), [SamplingParams(max_new_tokens=n) for n in (1, 7, 3, 5)]
    generate(model, prompts, settings, max_batch_size=2, overlap=True)
    generate(other, prompts, settings, max_batch_size=2, overlap=False)
    made = [(batch.num_decodes, batch.num_prefill_tokens) for batch in model.passes]
    assert made == [(batch.num_decodes, batch.num_prefill_tokens) for batch in other.passes]


def test_an_end_that_is_seen_late_costs_one_row() -> None:
    model = ToyModel(eos=tuple(range(40)))
    (result,) = generate(model, prompts_of([3]), SamplingParams(max_new_tokens=9), overlap=True)
    assert (len(result.token_ids), result.finish_reason) == (1, "eos")
    assert [batch.num_decodes for batch in model.passes] == [0, 1]
    assert not model.caches[0].used


@BOTH
def test_requests_that_join_and_leave_at_random_say_what_each_says_alone(overlap: bool) -> None:
    rng, model = random.Random(5), ToyModel(eos=(3,), usable=37)
    alone: dict[int, list[int | None]] = {}
    found: dict[int, list[int | None]] = {}
    with Engine(model, max_batch_size=5, max_prefill_tokens=7, overlap=overlap, check_steps=True) as engine:
        aborted = 0
        while len(alone) < 60 or engine.has_work:
            if len(alone) < 60 and rng.random() < 0.5:
                prompt = [rng.randrange(40) for _ in range(rng.choice([1, 1, 2, 5, 20]))]
                params = SamplingParams(
                    max_new_tokens=rng.randint(1, 9),
                    temperature=rng.choice([0.0, 0.9]),
                    repetition_penalty=rng.choice([1.0, 1.3]),
                    stop_token_ids=(5, 6),
                )
                index = engine.add_request(prompt, params, position=rng.randrange(1000))
                alone[index] = alone_as(engine._requests[index])
                found[index] = []
            if engine.has_work and rng.random() < 0.08:
                index = rng.choice(list(engine._requests))
                assert engine.abort(index)
                aborted += 1
                alone[index] = alone[index][: len(found[index])]
            for event in engine.step():
                found[event.index].append(event.token_id)
        assert aborted > 3
        assert found == alone
        assert not model.caches[0].used


def alone_as(request: Request) -> list[int | None]:
    """What this request says with the model to itself, in step."""
    with Engine(ToyModel(eos=(3,), usable=37), overlap=False) as engine:
        engine.add_request(request.prompt, request.params, position=request.position)
        return ids_of(drain(engine)[0])


class CheapModel:
    """Answers with a row of a table, by the last token; its cache is slot numbers."""

    device = torch.device("cpu")
    bytes_per_slot = activation_bytes_per_token = 1

    def __init__(self) -> None:
        self.tp = TensorParallel(device="cpu")
        self.config = SimpleNamespace(
            vocab_size=30, usable_vocab_size=None, eos_token_ids=(0,), pad_token_id=None
        )
        self.table = torch.randn(30, 30, generator=torch.Generator().manual_seed(3))

    def new_cache(self, slots: int) -> "CheapCache":
        self.cache = CheapCache(slots)
        return self.cache

    def forward_packed(
        self, input_ids: torch.Tensor, metadata: MambaMetadata, cache: object, logits_indices: torch.Tensor
    ) -> torch.Tensor:
        return self.table[input_ids[logits_indices]]


class CheapCache:
    def __init__(self, slots: int) -> None:
        self.pool = SlotPool(slots)

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def allocate(self) -> int:
        return self.pool.acquire()

    def free(self, slot: int) -> None:
        self.pool.release(slot)


@pytest.mark.parametrize(("overlap", "steps"), [(False, 1000), (True, 5000)], ids=["in step", "ahead"])
def test_random_steps_lose_no_slot(overlap: bool, steps: int) -> None:
    rng, model = random.Random(9), CheapModel()
    with Engine(model, max_batch_size=6, max_prefill_tokens=12, overlap=overlap) as engine:
        added: list[int] = []
        for _ in range(steps):
            if rng.random() < 0.45:
                params = SamplingParams(max_new_tokens=rng.randint(1, 8))
                added.append(
                    engine.add_request([rng.randrange(30) for _ in range(rng.randint(1, 15))], params)
                )
            if added and rng.random() < 0.1:
                engine.abort(rng.choice(added[-12:]))
            engine.step()
            used = 6 - model.cache.num_free
            holding = [r for r in engine._requests.values() if r.slot is not None and not r.all_launched]
            assert used == len(holding)
            assert engine._steps.in_flight <= int(overlap)
        assert len(added) > 0.4 * steps
        while engine.has_work:
            engine.step()
        assert model.cache.num_free == 6
        assert not engine._requests
        assert not engine._scheduler.has_work


def test_a_request_that_is_not_finite_ends_alone_and_its_row_in_flight_is_dropped() -> None:
    prompts, params = prompts_of([3, 4, 5]), SamplingParams(max_new_tokens=9)
    expected = generate(ToyModel(), prompts, params)
    model = ToyModel()
    model.spoils = lambda number, slot: slot == 1 and number >= 3
    events = by_request(list(stream(model, prompts, params, overlap=True)))
    assert ids_of(events[1]) == [*expected[1].token_ids[:2], None]
    assert events[1][-1].error.startswith("the logits of new token 2 are not finite")
    for index in (0, 2):
        assert ids_of(events[index]) == expected[index].token_ids
    assert [batch.num_decodes for batch in model.passes] == [0, 3, 3, 3, 2, 2, 2, 2, 2]


def test_an_aborted_request_gives_its_slot_to_the_next_while_its_row_is_in_flight() -> None:
    model, (first, second, third) = ToyModel(), prompts_of([4, 6, 2])
    params = SamplingParams(max_new_tokens=8, repetition_penalty=1.4)
    alone = [result.token_ids for result in generate(ToyModel(), [first, second, third], params)]
    with Engine(model, max_batch_size=2, overlap=True, check_steps=True) as engine:
        for prompt in (first, second, third):
            engine.add_request(prompt, params)
        events = engine.step()
        assert engine.abort(1)
        assert not engine.abort(1)
        rest = drain(engine)
        assert rest.keys() == {0, 2}
        assert ids_of(events)[:1] + ids_of(rest[0]) == alone[0]
        assert ids_of(rest[2]) == alone[2]


@BOTH
def test_closing_and_dropping_with_a_step_in_flight(overlap: bool) -> None:
    model = ToyModel()
    engine = Engine(model, overlap=overlap)
    for prompt in prompts_of([3, 4, 50]):
        engine.add_request(prompt, SamplingParams(max_new_tokens=9))
    engine.step()
    assert engine._steps.in_flight == int(overlap)
    engine.close()
    assert not model.caches[0].used
    cache = weakref.ref(model.caches.pop())
    assert cache() is None, "its memory would wait for a garbage collection"
    engine.close()
    with Engine(model, overlap=overlap) as engine:
        engine.add_request([1, 2], SamplingParams(max_new_tokens=9))
        engine.step()
        assert engine.abort(0)
        assert not engine.has_work
        assert engine.step() == []
        assert engine.add_request([1, 2], SamplingParams(max_new_tokens=3)) == 1
        assert len(drain(engine)[1]) == 3


def forward_fails(model: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoils(number: int, slot: int) -> bool:
        if number == 3:
            raise KeyboardInterrupt
        return False

    model.spoils = spoils


def sampling_fails(model: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def sample(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.zeros(2, dtype=torch.int64)

    monkeypatch.setattr("tp_mamba.engine.sampler.Sampler.sample", sample)


def text_fails(model: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(self: object, token: int, logprob: object) -> TokenEvent:
        raise KeyboardInterrupt

    monkeypatch.setattr("tp_mamba.engine.request.Request.accept", accept)


def allocation_fails(model: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    make = model.new_cache

    def new_cache(slots: int) -> object:
        cache, calls = make(slots), []
        right = cache.allocate

        def allocate() -> int:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return right()

        cache.allocate = allocate
        return cache

    monkeypatch.setattr(model, "new_cache", new_cache)


@BOTH
@pytest.mark.parametrize("fails", [forward_fails, sampling_fails, text_fails, allocation_fails])
def test_a_step_that_raises_closes_the_engine_and_frees_every_slot(
    fails: Callable[[ToyModel, pytest.MonkeyPatch], None], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ToyModel()
    fails(model, monkeypatch)
    engine = Engine(model, max_batch_size=2, overlap=overlap)
    for prompt in prompts_of([3, 4, 2]):
        engine.add_request(prompt, SamplingParams(max_new_tokens=9))
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    assert not model.caches[0].used
    assert not engine.has_work
    with pytest.raises(ValueError, match="this engine is closed"):
        engine.step()
