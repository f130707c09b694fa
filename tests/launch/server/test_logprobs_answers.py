"""Logprobs, echo and several texts of a prompt, as lm_eval and OpenAI's client read them."""

from __future__ import annotations

import math

import openai
import pytest
import torch
from server_process import MODEL, Oracle, ServerProcess
from tokenizers import Tokenizer, decoders, models

from tp_mamba.launch.server.logprobs import TokenTexts

PROMPT = "First Citizen:\n"


@pytest.fixture
def create(servers: object) -> object:
    """``completions.create`` of a server over one rank."""
    server: ServerProcess = servers(1)  # type: ignore[operator]
    return server.openai().completions.create


def logprobs_of(oracle: Oracle, ids: list[int]) -> torch.Tensor:
    """``[L, V]`` float64, of each place given what lies before it; the first row is no token's."""
    with torch.inference_mode():
        logits = oracle.model(torch.tensor([ids]))
    logits = getattr(logits, "logits", logits)
    return logits[0].double().log_softmax(-1)


def test_what_lm_eval_reads(create: object, oracle: Oracle) -> None:
    prompts = [oracle.tokenizer.encode(text).ids for text in (PROMPT, "KING HENRY")]
    answer = create(  # type: ignore[operator]
        model=MODEL, prompt=prompts, echo=True, max_tokens=1, logprobs=1, temperature=0
    )
    for choice, ids in zip(answer.choices, prompts, strict=True):
        found = choice.logprobs
        assert found.tokens == [*map(chr, ids), choice.text[-1]]
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        wanted = logprobs_of(oracle, ids)
        for place in range(1, len(ids)):
            row, value = wanted[place - 1], found.token_logprobs[place]
            assert abs(value - row[ids[place]].item()) < 1e-4
            # lm_eval's rule for "greedy": equal to the largest, as floats are
            assert (value == max(found.top_logprobs[place].values())) == (row.argmax().item() == ids[place])
            assert found.top_logprobs[place][found.tokens[place]] == value
        assert found.text_offset == list(range(len(ids) + 1))
        assert choice.text[:-1] == "".join(map(chr, ids))


def test_a_prompt_alone(create: object) -> None:
    answer = create(model=MODEL, prompt=PROMPT, echo=True, max_tokens=0, logprobs=0)  # type: ignore[operator]
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.tokens) == len(PROMPT)
    assert answer.usage.completion_tokens == 0
    with pytest.raises(openai.BadRequestError, match="max_tokens=0 without echo"):
        create(model=MODEL, prompt=PROMPT, max_tokens=0)  # type: ignore[operator]


def test_a_stream_says_the_same(create: object) -> None:
    given = {"model": MODEL, "prompt": PROMPT, "echo": True, "max_tokens": 12, "logprobs": 2, "seed": 3}
    whole = create(**given).choices[0]  # type: ignore[operator]
    pieces = [chunk.choices[0] for chunk in create(**given, stream=True)]  # type: ignore[operator]
    assert "".join(piece.text for piece in pieces) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for piece in pieces for entry in getattr(piece.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)
    assert all(len(top) in (2, 3) for top in whole.logprobs.top_logprobs[1:])


def test_several_texts(create: object, oracle: Oracle) -> None:
    answer = create(model=MODEL, prompt=[PROMPT, "KING"], n=3, max_tokens=12, seed=7)  # type: ignore[operator]
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len(set(texts)) == 6
    assert texts[0] == oracle.text(PROMPT, 12, temperature=1.0, seed=7)
    assert answer.usage.prompt_tokens == len(PROMPT) + 4
    assert answer.usage.completion_tokens == 72


def test_a_chat(servers: object) -> None:
    server: ServerProcess = servers(1)  # type: ignore[operator]
    answer = server.openai().chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        n=2,
    )
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        for entry in choice.logprobs.content:
            assert (
                entry.logprob == entry.top_logprobs[0].logprob == max(t.logprob for t in entry.top_logprobs)
            )
            assert bytes(entry.bytes or ()).decode() == entry.token
            assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1


def test_penalties_and_biases(create: object, oracle: Oracle) -> None:
    token = oracle.tokenizer.encode("x").ids[0]
    answer = create(  # type: ignore[operator]
        model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(token): 100}
    )
    assert answer.choices[0].text == "xxxx"
    penalty = {"frequency_penalty": 2.0, "presence_penalty": 1.0}
    answer = create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, **penalty)  # type: ignore[operator]
    assert answer.choices[0].text == oracle.text(PROMPT, 24, **penalty) != oracle.text(PROMPT, 24)
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        create(model=MODEL, prompt=PROMPT, logit_bias={"9999": 1})  # type: ignore[operator]


def test_bytes_of_half_a_character() -> None:
    tokenizer = Tokenizer(models.BPE({"Ã": 0, "©": 1, "a": 2}, []))
    tokenizer.decoder = decoders.ByteLevel()
    texts = TokenTexts(tokenizer)
    assert [texts.bytes(token) for token in (0, 1, 2)] == [[0xC3], [0xA9], [ord("a")]]
    assert texts.text(0) == "\ufffd"
