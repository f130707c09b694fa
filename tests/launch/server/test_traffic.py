"""Many clients at once: those that leave, and those that send nonsense, beside those that are to notice nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
import time

import httpx
import openai
from load import ask_for
from malformed import answer, wrong_requests
from server_process import MODEL, TIMEOUT_S, Oracle, ServerProcess

PROMPTS = ("First Citizen:\n", "KING", "The sea", "O, ", "What", "My lord, I", "JULIET:\nHow", "a")
LONGEST, FOR_EVER = 16, 400
WORK = ("requests_open", "requests_running", "requests_waiting", "http_requests_open")


def wait_until_idle(server: ServerProcess) -> dict[str, float]:
    """The metrics once nothing is in flight; the one connection is that of who asks."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(
        metrics[name] > (name == "http_requests_open") for metrics in [server.metrics()] for name in WORK
    ):
        assert time.monotonic() < deadline, server.metrics()
        time.sleep(0.05)
    return server.metrics()


def test_streams_of_which_a_quarter_is_left(servers: object, oracle: Oracle) -> None:
    server: ServerProcess = servers(1)  # type: ignore[operator]
    alone = {prompt: oracle.text(prompt, LONGEST, ignore_eos=True) for prompt in PROMPTS}
    before = wait_until_idle(server)
    rng = random.Random(5)

    async def ask(client: openai.AsyncOpenAI, prompt: str, tokens: int, leave_after: int | None) -> None:
        stream = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text, chunks = "", 0
        async for chunk in stream:
            text, chunks = text + chunk.choices[0].text, chunks + 1
            if chunks == leave_after:
                await stream.close()
                break
        if leave_after is None:
            assert text == alone[prompt][:tokens]
        else:
            assert alone[prompt].startswith(text)

    async def everybody() -> None:
        async with (
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1",
                api_key=server.key,
                max_retries=0,
                http_client=httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=TIMEOUT_S),
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for number in range(200):
                leaves = number % 4 == 0
                tokens = FOR_EVER if leaves else rng.randrange(1, LONGEST)
                group.create_task(
                    ask(client, rng.choice(PROMPTS), tokens, rng.randrange(1, 8) if leaves else None)
                )

    asyncio.run(everybody())
    after = wait_until_idle(server)
    left = after['texts_finished_total{reason="abort"}'] - before.get(
        'texts_finished_total{reason="abort"}', 0
    )
    whole = after['texts_finished_total{reason="length"}'] - before.get(
        'texts_finished_total{reason="length"}', 0
    )
    assert left + whole == 200
    assert 0 < left <= 50  # on a busy machine many are finished before the server sees that nobody reads them


def test_nonsense_beside_a_stream(servers: object, oracle: Oracle) -> None:
    server: ServerProcess = servers(1)  # type: ignore[operator]
    assert server.key is not None
    wanted = oracle.text("KING", 150, ignore_eos=True)
    stream = server.openai().completions.create(
        model=MODEL,
        prompt="KING",
        max_tokens=150,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [next(stream).choices[0].text]
    for wrong in itertools.islice(wrong_requests(server.key, random.Random(1)), 60):
        status, body = answer(server.url, wrong)
        assert 400 <= status < 500, wrong.what
        assert isinstance(body["error"]["message"], str), wrong.what  # type: ignore[index]
    pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == wanted
    assert server.errors() == ""
    wait_until_idle(server)


def test_sustained_load(servers: object) -> None:
    server: ServerProcess = servers(2)  # type: ignore[operator]
    tokens, found, _ = asyncio.run(ask_for(server.url, server.headers, seconds=1, clients=16))
    assert set(found) == {"finished"}
    assert found["finished"] >= 16
    assert tokens >= 8 * found["finished"]
    wait_until_idle(server)
