"""Samples of a prompt, and prompts that begin alike: what they share is computed once, and changes no token."""

from __future__ import annotations

import random

import pytest
from test_engine import drain, ids_of
from test_prefix_reuse import keeping
from toy_model import ToyModel, prompts_of

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.generate import generate
from tp_mamba.engine.params import SamplingParams

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])


def prefilled(model: ToyModel) -> int:
    return sum(batch.num_prefill_tokens for batch in model.passes)


@BOTH
@pytest.mark.parametrize("limits", [{}, {"max_batch_size": 2}, {"max_prefill_tokens": 7}], ids=str)
def test_samples_share_a_prompt(overlap: bool, limits: dict[str, int]) -> None:
    prompts = prompts_of([60, 3, 45])
    params = SamplingParams(max_new_tokens=6, temperature=3.0, seed=3, n=4, logprobs=1)
    # With one slot nothing is shared.
    expected = generate(ToyModel(), prompts, params, max_batch_size=1)
    model = ToyModel()
    results = generate(model, prompts, params, overlap=overlap, **limits)
    assert results == expected
    assert len({tuple(result.token_ids) for result in results}) == 12
    one_each = generate(ToyModel(), prompts, params, n=1)
    assert results[::4] == one_each, "the first sample is that of n=1"
    assert prefilled(model) == (59 + 4) + 4 * 3 + (44 + 4)
    assert not model.caches[0].used


@BOTH
def test_the_context_of_a_choice_is_counted_once(overlap: bool) -> None:
    (context, *ends), model = prompts_of([70, 5, 2, 9, 1]), ToyModel()
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=1, prompt_logprobs_start=70)
    with Engine(model, overlap=overlap) as engine:
        indices = engine.add_alike([context + end for end in ends], params)
        events = drain(engine)
    assert prefilled(model) == 69 + sum(1 + len(end) for end in ends)
    for index, end in zip(indices, ends, strict=True):
        (event,) = events[index]
        for i, found in enumerate(event.prompt_logprobs):
            logits = model.whole(context + end[:i])
            assert found.token_id == end[i]
            assert found.logprob == pytest.approx(logits.double().log_softmax(-1)[end[i]].item(), abs=1e-6)


@BOTH
@pytest.mark.parametrize("keeps", [False, True], ids=["", "prefixes"])
def test_many_at_random_with_few_slots(overlap: bool, keeps: bool) -> None:
    rng = random.Random(7 + keeps)
    for slots in (1, 2, 3, 5):
        model, alone, found = ToyModel(eos=(3,)), {}, {}
        with Engine(
            model,
            max_batch_size=slots,
            max_prefill_tokens=30,
            overlap=overlap,
            check_steps=True,
            cache_config=keeping() if keeps else None,
        ) as engine:
            while len(alone) < 60 or engine.has_work:
                if len(alone) < 60 and rng.random() < 0.4:
                    prompt = [rng.randrange(40) for _ in range(rng.choice([1, 20, 36, 70]))]
                    params = SamplingParams(
                        max_new_tokens=rng.randint(1, 6),
                        temperature=rng.choice([0.0, 1.0]),
                        n=rng.choice([1, 2, 3, 6]),
                        frequency_penalty=rng.choice([0.0, 0.5]),
                    )
                    first = engine.add_request(prompt, params, position=len(alone))
                    with Engine(ToyModel(eos=(3,)), max_batch_size=1, overlap=False) as other:
                        other.add_request(prompt, params, position=len(alone))
                        for index, events in drain(other).items():
                            alone[first + index], found[first + index] = ids_of(events), []
                if engine.has_work and rng.random() < 0.15:
                    index = rng.choice(list(engine._requests))
                    assert engine.abort(index)
                    alone[index] = alone[index][: len(found[index])]
                for event in engine.step():
                    found[event.index].append(event.token_id)
            assert found == alone
            engine.add_request([1] * 50, SamplingParams(n=3))
            engine.step()
        assert not model.caches[0].used


def test_no_samples_and_too_many_are_refused() -> None:
    for n in (0, 129):
        with pytest.raises(ValueError, match=f"n={n} is out of range: ask for 1 to 128 samples"):
            SamplingParams(n=n)
    with Engine(ToyModel()) as engine, pytest.raises(ValueError, match="the list of prompts is empty"):
        engine.add_alike([])
