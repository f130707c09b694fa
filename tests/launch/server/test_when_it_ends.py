"""How a server ends: by a signal, with answers finished or cut, and when a rank is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from process_groups import wait_until_empty
from server_process import MODEL, ServerProcess

from tp_mamba.launch.server.run import listen

LONG = 2000
"""New tokens that take longer than a drain of three seconds."""


def open_stream(server: ServerProcess, tokens: int) -> Iterator[openai.types.Completion]:
    """A stream that has begun."""
    stream = iter(
        server.openai().completions.create(
            model=MODEL,
            prompt="KING",
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    next(stream)
    return stream


def test_a_rank_that_is_killed(servers: object) -> None:
    server: ServerProcess = servers(2)  # type: ignore[operator]
    stream = open_stream(server, LONG)
    killed = time.monotonic()
    os.kill(server.ranks()[1], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine has ended"):
        list(stream)
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "lost")
    with pytest.raises(openai.InternalServerError) as refused:
        server.openai().completions.create(model=MODEL, prompt="a")
    assert refused.value.status_code == 503
    assert server.process.wait(30) == 1
    assert time.monotonic() - killed < 30
    assert "rank 1 was killed by SIGKILL" in server.errors()
    wait_until_empty(server.process.pid)


@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_cuts_what_takes_too_long(servers: object, size: int) -> None:
    server: ServerProcess = servers(size)  # type: ignore[operator]
    long, short = open_stream(server, LONG), open_stream(server, 20)
    os.killpg(server.process.pid, signal.SIGTERM)  # as a supervisor does: to every process
    with httpx.Client(base_url=server.url, headers=server.headers) as http:
        while (health := http.get("/health")).status_code == 200:
            pass
        assert health.json()["status"] == "draining"
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 503
    assert list(short)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIError, match="shut down before this answer was finished"):
        list(long)
    assert server.process.wait(30) == 0
    assert server.errors() == ""
    wait_until_empty(server.process.pid)


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"^cannot listen at 127.0.0.1 port {port} \(Address already in use\)"
        ):
            listen("127.0.0.1", port)
