"""Requests that are wrong, as bytes; `python malformed.py URL KEY` sends 500 of them, slow ones included."""

from __future__ import annotations

import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Wrong:
    """One request."""

    what: str
    content: bytes
    half_closed: bool = False
    """Whether the sender ends its side of the connection behind it."""


def request(key: str, body: bytes, *, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """A POST of JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode("latin-1") + body


def wrong_requests(key: str, rng: random.Random) -> Iterator[Wrong]:
    """Without end, each of another kind than the one before."""
    values = (True, None, -1, 2**70, 1.5, -0.5, "text", [], [[]], {}, {"a": 1}, [None], 10**400, "1", [True])
    wrong_for = {
        "prompt": [
            None,
            5,
            1.5,
            True,
            {},
            [],
            [[]],
            ["a", 1],
            [1, "a"],
            [[1], "a"],
            [-1],
            [256],
            [2**70],
            [True],
            "",
        ],
        "max_tokens": [v for v in values if v is not None and v != True] + [0, 10**9],  # noqa: E712
        "temperature": [-1, "hot", [], 10**400, {}],
        "top_p": [0, -1, 2, "x", []],
        "n": [0, -3, 1000, 2**70, 1.5, "1", [], True],
        "seed": [2**64, -(2**70), 1.5, "x", []],
        "stop": [5, [5], [""], "", {}, ["x"] * 17],
        "stream": [5, "yes", []],
        "logprobs": [-1, 21, 2**70, "x", True],
        "model": [5, "other", [], {}],
        "logit_bias": [5, [], {"x": 1}, {"1": "x"}, {"1": 1000}, {"99999": 1}],
        "stop_token_ids": [5, ["x"], [-1], [256], [2**70]],
        "min_tokens": [-1, 100000, "x", 1.5],
        "presence_penalty": [3, "x"],
        "suffix": ["x", 5],
        "best_of": [2, "x"],
        "stream_options": [5, {"include_usage": True}],
        "unknown": list(values),
    }
    good = {"model": None, "prompt": "a", "max_tokens": 4}
    while True:
        for field, choices in wrong_for.items():
            value = rng.choice(choices)
            body = json.dumps(good | {field: value}).encode()
            yield Wrong(f"{field}={str(value)[:30]}", request(key, body))
        raw = json.dumps(good).encode()
        for what, body in (
            ("broken UTF-8", raw.replace(b'"a"', b'"\xff\xfe\xc3"')),
            ("half a surrogate pair", raw.replace(b'"a"', b'"\\ud800"')),
            ("half of JSON", raw[: rng.randrange(1, len(raw) - 1)]),
            ("no JSON", bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))),
            ("NaN", raw.replace(b"4", b"NaN")),
            ("Infinity", raw.replace(b"4", b"1e999")),
            ("a long number", raw.replace(b"4", b"9" * 5000)),
            ("deep", b"[" * 100_000),
            ("deep and whole", b'{"prompt":' * 5000 + b"1" + b"}" * 5000),
            ("nothing", b""),
            ("null", b"null"),
            ("a list", b"[]"),
            ("too large", b'{"prompt": "' + b"a" * 5_000_000 + b'"}'),
        ):
            yield Wrong(what, request(key, body))
        cut = rng.randrange(1, len(raw))
        yield Wrong("a body cut off", request(key, raw[:cut], length=len(raw) + 10), half_closed=True)
        yield Wrong("a length that is too large", request(key, b"", length=10**30))
        yield Wrong("a wrong key", request("wrong", raw))
        yield Wrong("a key of other bytes", request("\xff\xe9", raw))
        yield Wrong("no HTTP", bytes(rng.randrange(33, 127) for _ in range(50)) + b"\r\n\r\n")
        yield Wrong("no host", b"GET /v1/models HTTP/1.1\r\n\r\n")
        yield Wrong("long headers", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
        yield Wrong("no such path", request(key, raw, path="/v1/" + "x" * rng.randrange(1, 50)))
        yield Wrong("no such method", b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        yield Wrong("another content type", request(key, raw).replace(b"application/json", b"text/plain"))
        chat = json.dumps(
            {"messages": rng.choice([[], [5], [{"role": 5}], "x", [{"content": "x"}]])}
        ).encode()
        yield Wrong("a chat", request(key, chat, path="/v1/chat/completions"))
        yield Wrong("detokenize", request(key, b'{"tokens": [1, 256]}', path="/detokenize"))
        yield Wrong("tokenize", request(key, b'{"prompt": 5}', path="/tokenize"))


def answer(url: str, wrong: Wrong) -> tuple[int, dict[str, object]]:
    """The status and the JSON that come back."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=TIMEOUT_S) as connection:
        try:
            connection.sendall(wrong.content)
            if wrong.half_closed:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


def main(url: str, key: str, count: int = 500) -> None:
    """Send them, eight at a time, and with them forty that stop in the middle; and say what came back."""
    rng = random.Random(0)
    every = wrong_requests(key, rng)
    requests = [next(every) for _ in range(count - 40)]
    requests += [Wrong("a head that stops", b"POST /v1/comp") for _ in range(20)]
    requests += [Wrong("a body that stops", request(key, b'{"prompt"', length=1000)) for _ in range(20)]
    with ThreadPoolExecutor(48) as pool:
        found = list(pool.map(lambda wrong: answer(url, wrong), requests))
    print(len(found), "answers:", dict(sorted(Counter(status for status, _ in found).items())))
    for wrong, (status, body) in zip(requests, found, strict=True):
        if not (400 <= status < 500 and isinstance(body.get("error"), dict)):
            print("NOT REFUSED:", wrong.what, status, body)


if __name__ == "__main__":
    main(*sys.argv[1:3])
