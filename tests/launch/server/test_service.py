"""The routes over a service without an engine: what is let in, what is refused, and what is dropped when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx
import pytest
from server_process import EXAMPLE

from tp_mamba import load_tokenizer
from tp_mamba.engine.request import TokenEvent
from tp_mamba.launch.cli import main
from tp_mamba.launch.server import http
from tp_mamba.launch.server.app import Api, make_app
from tp_mamba.launch.server.codec import Codec
from tp_mamba.launch.server.run import listen
from tp_mamba.launch.server.service import Limits, Service
from tp_mamba.launch.server.stepping import Abort, Add, Batch, Refusal
from tp_mamba.launch.verbs import serve

TOKENIZER = load_tokenizer(EXAMPLE)
ASK = {"prompt": "a", "max_tokens": 2}


class World:
    """An app of two slots whose engine is the test."""

    def __init__(self, **limits: Any) -> None:
        self.commands: list[Add | Abort] = []
        self.service = Service(self.commands.append, Limits(**{"max_queue": 1, **limits}), 2)
        codec = Codec(tokenizer=TOKENIZER, vocab_size=256)
        self.app = make_app(Api(service=self.service, codec=codec, model="m"))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server")

    async def ask(self, **more: Any) -> httpx.Response:
        """A completion."""
        return await self.client.post("/v1/completions", json={**ASK, **more})

    async def commanded(self, count: int) -> None:
        """Wait for so many commands."""
        while len(self.commands) < count:
            await asyncio.sleep(0)

    def say(self, key: int, text: str, reason: Any = None) -> None:
        """An event of the text ``key``."""
        self.service.on_batch(Batch([(key, TokenEvent(0, 65, text, reason))], when=1e9))


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def sentence(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


def test_a_full_queue() -> None:
    async def body() -> None:
        world = World()
        asked = [asyncio.create_task(world.ask()) for _ in range(3)]
        await world.commanded(3)
        answer = await world.ask()
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert re.match(
            r"the server has 3 texts to make and holds 3 at most: ask again in \d+ s", sentence(answer)
        )
        assert sentence(await world.ask(n=4)).startswith(
            "the request asks for 4 texts, the server holds 3 at most"
        )
        world.say(0, "x", "length")
        assert (await asked[0]).json()["choices"][0]["text"] == "x"
        asked.append(asyncio.create_task(world.ask()))  # there is room again
        await world.commanded(4)
        assert [list(command.keys) for command in world.commands] == [[0], [1], [2], [3]]
        for key in (1, 2, 3):
            world.say(key, "y", "eos")
        assert [(await task).status_code for task in asked[1:]] == [200] * 3
        assert world.service.idle.is_set()
        assert world.service.metrics.answers == {200: 4, 429: 1, 400: 1}

    run(body())


def test_too_large_and_too_slow() -> None:
    async def body() -> None:
        world = World(max_request_bytes=100, body_seconds=0.05, request_seconds=0.1)
        headers = {"Content-Type": "application/json"}

        async def chunks(*, stalls: bool) -> AsyncIterator[bytes]:
            yield b" " * 60
            if stalls:
                await asyncio.Event().wait()
            yield b" " * 60

        for content in (b" " * 101, chunks(stalls=False)):
            answer = await world.client.post("/v1/completions", content=content, headers=headers)
            assert (answer.status_code, sentence(answer)[:32]) == (413, "the body is larger than 100 B: d")
        answer = await world.client.post("/v1/completions", content=chunks(stalls=True), headers=headers)
        assert (answer.status_code, sentence(answer)) == (
            408,
            "the body did not arrive within 0.05 s: send it faster",
        )
        assert world.commands == []
        answer = await world.ask()
        assert (answer.status_code, sentence(answer)) == (
            504,
            "the answer was not finished within 0.1 s: ask for fewer tokens",
        )
        assert answer.headers["x-should-retry"] == "false"
        assert [type(command) for command in world.commands] == [Add, Abort]

    run(body())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("spoken", [False, True])
def test_a_client_that_goes_away(stream: bool, spoken: bool) -> None:
    async def body() -> None:
        world = World()
        gone, sent = asyncio.Event(), []
        content = json.dumps({**ASK, "stream": stream, "n": 2}).encode()
        arriving = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if arriving:
                return arriving.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "server": ("server", 80),
            "client": ("client", 1),
            "scheme": "http",
            "root_path": "",
        }
        serving = asyncio.create_task(world.app(scope, receive, send))
        await world.commanded(1)
        if spoken:
            world.say(0, "x")
            world.say(1, "y", "length")
        gone.set()
        await serving
        left = {0} if spoken else {0, 1}  # the other text was finished
        assert {command.key for command in world.commands[1:]} == left
        assert all(isinstance(command, Abort) for command in world.commands[1:])
        assert world.service.metrics.open == 0
        assert world.service.idle.is_set()

    run(body())


def test_what_the_engine_refuses_and_its_end() -> None:
    async def body() -> None:
        world = World()
        asked = asyncio.create_task(world.ask())
        await world.commanded(1)
        world.service.on_batch(Batch([(0, Refusal("no such thing"))]))
        assert ((await asked).status_code, sentence(await asked)) == (400, "no such thing")
        asked = asyncio.create_task(world.ask(stream=True))
        await world.commanded(3)
        world.service.lose("the engine has ended")
        last = (await asked).text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the engine has ended"
        assert (await world.ask()).status_code == 503
        assert (await world.client.get("/health")).json()["status"] == "lost"

    run(body())


def test_a_text_that_fails() -> None:
    async def body() -> None:
        world = World()
        asked = asyncio.create_task(world.ask())
        await world.commanded(1)
        event = TokenEvent(0, None, "", "error", "the logits are not finite")
        world.service.on_batch(Batch([(0, event)], when=1e9))
        assert ((await asked).status_code, sentence(await asked)) == (500, "the logits are not finite")

    run(body())


def test_metrics_are_prometheus_text() -> None:
    async def body() -> None:
        world = World()
        asked = asyncio.create_task(world.ask())
        await world.commanded(1)
        world.say(0, "x")
        world.say(0, "x", "length")
        await asked
        lines = (await world.client.get("/metrics")).text.splitlines()
        sample = re.compile(r'tp_mamba_[a-z_]+(\{[a-z]+="[^"]+"\})? [0-9.e+-]+')
        assert all(line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line) for line in lines)
        assert {"tp_mamba_new_tokens_total 2", "tp_mamba_prompt_tokens_total 1"} <= set(lines)
        assert 'tp_mamba_texts_finished_total{reason="length"} 1' in lines
        assert "tp_mamba_time_to_first_token_seconds_count 1" in lines

    run(body())


@pytest.mark.parametrize(
    ("sent", "status", "sentence"),
    [
        (b"POST /v1/comp", 408, "no request arrived within 0.2 s: send it faster"),
        (b"", 408, "no request arrived within 0.2 s: send it faster"),
        (b"\x16\x03\x01\x02\r\n\r\n", 400, "the request is not HTTP/1.1 that can be read: send it again"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "the request is not HTTP/1.1 that can be read: send it again"),
    ],
)
def test_no_patience_with_half_a_request(
    sent: bytes, status: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.2)

    async def body() -> None:
        listening = asyncio.Event()
        server = http.Server(World().app, listening.set)
        bound = listen("127.0.0.1", 0)
        serving = asyncio.create_task(server.serve([bound]))
        await listening.wait()
        reader, writer = await asyncio.open_connection(*bound.getsockname())
        writer.write(sent)
        answer = await reader.read()
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert json.loads(content)["error"]["message"] == sentence
        writer.close()
        server.should_exit = True
        await serving

    run(body())


def test_nothing_imports_the_extra_unless_it_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys; from tp_mamba.launch.cli import make_parser; make_parser(); "
        "print({'fastapi', 'uvicorn', 'pydantic', 'starlette'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with contextlib.suppress(SystemExit):
        assert main(["serve", str(EXAMPLE)]) == 2
    wanted = "tp-mamba serve: error: fastapi is not installed: pip install 'tp-mamba[serve]'\n"
    assert capsys.readouterr().err == wanted
