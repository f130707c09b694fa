"""Presence and frequency penalties, logit bias, and texts that must not end yet: against their definitions."""

import pytest
import torch
from test_engine import drain, ids_of
from test_generate_engine import tokenizer_of_letters
from toy_model import ToyModel, prompts_of

from tp_mamba.engine.choice import adjust
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.generate import generate
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.sampler import Sampler

SETTINGS = [
    {},
    {"presence_penalty": 1.7},
    {"frequency_penalty": 0.9},
    {"presence_penalty": -1.1, "frequency_penalty": -0.3, "repetition_penalty": 1.3},
    {"logit_bias": {3: 100, 5: -2.5}},
    {"logit_bias": {7: 4.0}, "frequency_penalty": 2, "min_tokens": 5, "stop_token_ids": (7, 9)},
    {"min_tokens": 9, "stop_token_ids": tuple(range(20))},
]


def defined(logits: list[float], prompt: list[int], text: list[int], params: SamplingParams) -> list[float]:
    """A row of logits as a choice takes it, number by number."""
    found, bias = [], dict(params.logit_bias)
    for token, logit in enumerate(logits):
        logit += bias.get(token, 0.0)
        if len(text) < params.min_tokens and token in params.stop_token_ids:
            logit = -torch.inf
        if token in prompt or token in text:
            logit = logit * params.repetition_penalty if logit < 0 else logit / params.repetition_penalty
        logit -= params.frequency_penalty * text.count(token)
        logit -= params.presence_penalty * (token in text)
        found.append(logit)
    return found


def one_by_one(model: ToyModel, prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy by the definition, the whole sequence anew for every token."""
    text: list[int] = []
    while len(text) < params.max_new_tokens:
        logits = defined(model.whole(prompt + text).double().tolist(), prompt, text, params)
        text.append(max(range(len(logits)), key=lambda token: logits[token]))
        if text[-1] in params.stop_token_ids or text[-1] in model.config.eos_token_ids:
            break
    return text


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])
def test_requests_beside_one_another_follow_the_definition(overlap: bool) -> None:
    prompts = prompts_of([3, 1, 9, 5, 2, 14, 4, 6, 3, 2, 1, 8, 2, 5])
    settings = [SamplingParams(max_new_tokens=12, **each) for each in SETTINGS * 2]
    model = ToyModel()
    expected = [one_by_one(model, *each) for each in zip(prompts, settings, strict=True)]
    # Few slots, so that each is used by requests that need tables and by others.
    results = generate(model, prompts, settings, max_batch_size=3, overlap=overlap)
    assert [result.token_ids for result in results] == expected
    plain = [one_by_one(model, prompt, SamplingParams(max_new_tokens=12)) for prompt in prompts]
    changed = [index % len(SETTINGS) for index, ids in enumerate(expected) if ids != plain[index]]
    assert set(changed) >= {1, 2, 3, 4, 5, 6}


def test_a_row_keeps_its_bits_beside_others() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(len(SETTINGS), 50, generator=generator)
    made = torch.randint(3, logits.shape, generator=generator, dtype=torch.int32)
    for params in ({}, {"presence_penalty": 1.1, "frequency_penalty": 0.7}):
        rows = adjust(logits, SamplingParams(**params), made=made, bias=torch.zeros_like(logits))
        for row, other in enumerate(logits):
            alone = adjust(other[None], SamplingParams(**params), made=made[row : row + 1])
            assert torch.equal(rows[row : row + 1], alone)
        assert torch.equal(rows, logits) == (not params)


def test_nothing_is_left_in_a_slot_for_the_next_request() -> None:
    sampler = Sampler(2, 20, 20, torch.device("cpu"))
    logits, free = torch.zeros(2, 20), SamplingParams()
    settings = [SamplingParams(logit_bias={4: 9.0}, presence_penalty=2.0), SamplingParams(logit_bias={6: 1})]
    for row_params, expected in ((settings, [4, 6]), ([free, settings[1]], [0, 6]), (settings, [4, 6])):
        requests = [Request(i, [1], params, slot=i) for i, params in enumerate(row_params)]
        for request in requests:
            sampler.begin(request)
        assert sampler.sample(logits, requests).tolist() == expected


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])
def test_a_text_ends_after_min_tokens_at_the_earliest(overlap: bool) -> None:
    model, (prompt,) = ToyModel(eos=tuple(range(30))), prompts_of([6])
    for least in (0, 1, 4, 8):
        with Engine(model, overlap=overlap) as engine:
            params = SamplingParams(max_new_tokens=8, min_tokens=least)
            engine.add_request(prompt, params)
            engine.add_request(prompt, SamplingParams(max_new_tokens=8, min_tokens=least, ignore_eos=True))
            events = drain(engine)
        ids = ids_of(events[0])
        assert all(token >= 30 for token in ids[:least])
        assert len(ids) == 8 or (len(ids) > least and ids[-1] < 30)
        assert len(events[1]) == 8
        assert any(token < 30 for token in ids_of(events[1])), "what ends no text is not kept out of it"


def test_early_text_is_not_searched_for_stop_strings() -> None:
    model, (prompt,), tokenizer = ToyModel(seed=2), prompts_of([6]), tokenizer_of_letters()
    (free,) = generate(model, [prompt], tokenizer=tokenizer, max_new_tokens=12)
    stop = (free.text[1],)
    for least in range(12):
        (found,) = generate(
            model, [prompt], tokenizer=tokenizer, max_new_tokens=12, min_tokens=least, stop=stop
        )
        assert found.text == free.text[: least + (free.text[least:] + stop[0]).index(stop[0])]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 is out of range"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3.0 is out of range"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan is out of range"),
        ({"logit_bias": {1: 101}}, "logit_bias of id 1 is 101.0: it lies between"),
        ({"logit_bias": {1: "a"}}, "logit_bias of id 1 is 'a', which is not a number"),
        ({"logit_bias": {"x": 1}}, "an id of logit_bias is 'x', which is not an integer"),
        ({"logit_bias": {"7": 1, 7: 2}}, "logit_bias holds the id 7 twice"),
        ({"logit_bias": 5}, "logit_bias is 5: give a mapping"),
        (
            {"min_tokens": 9, "max_new_tokens": 8},
            "min_tokens=9 is out of range: it lies between 0 and max_new",
        ),
        ({"min_tokens": -1}, "min_tokens=-1 is out of range"),
    ],
    ids=str,
)
def test_wrong_parameters(wrong: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence):
        SamplingParams(**wrong)


def test_a_bias_is_kept_as_pairs_and_held_against_the_vocabulary() -> None:
    assert SamplingParams(logit_bias={"9": 1, 2: -1}).logit_bias == ((2, -1.0), (9, 1.0))
    with Engine(ToyModel()) as engine, pytest.raises(ValueError, match="holds the id 40, the vocabulary has"):
        engine.add_request([1], SamplingParams(logit_bias={40: 1}))
