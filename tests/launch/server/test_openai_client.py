"""The official client against a real server, over one rank and two."""

from __future__ import annotations

import openai
import pytest
from server_process import MODEL, TEMPLATE, Oracle, ServerProcess

PROMPT = "First Citizen:\n"


def test_models(server_of_one: ServerProcess) -> None:
    client = server_of_one.openai()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tp-mamba"
    with pytest.raises(openai.NotFoundError, match="is not served here: ask for 'shakespeare'"):
        client.models.retrieve("gpt-4")


def test_a_completion(server: ServerProcess, oracle: Oracle) -> None:
    answer = server.openai().completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == oracle.text(PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 20)


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts(server: ServerProcess, oracle: Oracle, as_ids: bool) -> None:
    texts = [PROMPT, "KING", "The sea is"]
    ids = [oracle.tokenizer.encode(text).ids for text in texts]
    given = ids if as_ids else texts
    answer = server.openai().completions.create(model=MODEL, prompt=given, max_tokens=8, temperature=0)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (index, oracle.text(text, 8)) for index, text in enumerate(texts)
    ]


def test_one_list_of_ids(server: ServerProcess, oracle: Oracle) -> None:
    ids = oracle.tokenizer.encode(PROMPT).ids
    answer = server.openai().completions.create(model=MODEL, prompt=ids, max_tokens=8, temperature=0)
    assert answer.choices[0].text == oracle.text(PROMPT, 8)


def test_a_stream(server: ServerProcess, oracle: Oracle) -> None:
    stream = server.openai().completions.create(
        model=MODEL,
        prompt=[PROMPT, "KING"],
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts, reasons = ["", ""], [[], []]
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index].append(choice.finish_reason)
    assert texts == [oracle.text(PROMPT, 20), oracle.text("KING", 20)]
    assert all(one[-1] == "length" and not any(one[:-1]) for one in reasons)
    assert max(map(len, reasons)) > 10  # it came in pieces
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(PROMPT) + 4, 40)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_stop_strings(server_of_one: ServerProcess, oracle: Oracle) -> None:
    whole = oracle.text(PROMPT, 40)
    stop = whole[10:13]
    answer = server_of_one.openai().completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "nowhere"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_text(server_of_one: ServerProcess, oracle: Oracle) -> None:
    def ask(**seed: int) -> str:
        answer = server_of_one.openai().completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, **seed)
        return answer.choices[0].text

    assert ask(seed=5) == ask(seed=5) == oracle.text(PROMPT, 12, temperature=1.0, seed=5)
    assert ask(seed=-1) == oracle.text(PROMPT, 12, temperature=1.0, seed=2**64 - 1)
    assert len({ask() for _ in range(2)}) == 2


def test_a_chat(server: ServerProcess, oracle: Oracle) -> None:
    messages = [{"role": "system", "content": "Speak"}, {"role": "user", "content": "Who is there?"}]
    prompt = "system: Speak\nuser: Who is there?\nassistant:"
    create = server.openai().chat.completions.create
    answer = create(model=MODEL, messages=messages, max_tokens=16, temperature=0)  # type: ignore[call-overload]
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == oracle.text(prompt, 16)
    assert answer.usage.prompt_tokens == len(prompt)
    stream = create(  # type: ignore[call-overload]
        model=MODEL, messages=messages, max_completion_tokens=16, temperature=0, stream=True
    )
    deltas = [chunk.choices[0] for chunk in stream]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == answer.choices[0].message.content
    assert deltas[-1].finish_reason == "length"


def test_parts_of_a_message_are_one_text(server_of_one: ServerProcess) -> None:
    def ask(content: object) -> str:
        answer = server_of_one.openai().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
        )
        return str(answer.choices[0].message.content)

    assert ask([{"type": "text", "text": "Who is "}, {"type": "text", "text": "there?"}]) == ask(
        "Who is there?"
    )
    with pytest.raises(openai.BadRequestError, match="no text, and this model reads nothing else"):
        ask([{"type": "image_url", "image_url": {"url": "x"}}])


def test_tokenizer_routes(server_of_one: ServerProcess, oracle: Oracle) -> None:
    with server_of_one.http() as http:
        ids = oracle.tokenizer.encode("The sea").ids
        found = http.post("/tokenize", json={"prompt": "The sea", "add_special_tokens": False}).json()
        assert (found["tokens"], found["count"]) == (ids, len(ids))
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The sea"}
        messages = [{"role": "user", "content": "Hi"}]
        chat = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert oracle.tokenizer.decode(chat) == "user: Hi\nassistant:"
        info = http.get("/tokenizer_info").json()
        assert info["chat_template"] == TEMPLATE
        assert http.post("/tokenize", json={"prompt": info["eos_token"]}).json()["count"] == 1


@pytest.mark.parametrize(
    ("given", "status", "sentence"),
    [
        ({"model": "other"}, 404, "the model 'other' is not served here"),
        ({"prompt": ""}, 400, "prompt 0 is empty"),
        ({"prompt": [[1, 2], [3, 5000]]}, 400, "prompt 1 holds the id 5000"),
        ({"max_tokens": 2001}, 400, "2001 new tokens were asked for, the server makes at most 2000"),
        ({"temperature": -1}, 400, "temperature is -1"),
        ({"extra_body": {"temprature": 1}}, 400, "temprature is no field of this request: leave it out"),
        ({"suffix": "end"}, 400, "it fills no gap"),
        ({"best_of": 3}, 400, "best_of=3 is not served"),
    ],
)
def test_errors(server_of_one: ServerProcess, given: dict[str, object], status: int, sentence: str) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        server_of_one.openai().completions.create(**({"model": MODEL, "prompt": "a", **given}))  # type: ignore[call-overload]
    assert raised.value.status_code == status
    assert sentence in raised.value.message
    assert raised.value.type in ("invalid_request_error", "not_found_error")


def test_a_wrong_key(server_of_one: ServerProcess) -> None:
    for key in ("wrong", "a key of testz", "a", "\xe9\xff"):
        with server_of_one.http() as http:
            headers = {"Authorization": f"Bearer {key}".encode("latin-1")}
            answer = http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        server_of_one.openai(api_key="wrong").models.list()
    assert server_of_one.http().get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}
