"""Sustained load: 64 clients against a server, beside the engine's own throughput on the same requests.

`python load.py FOLDER RANKS SECONDS [ROUNDS]` alternates the two, in processes of their own, and tells new tokens per
second. Half of the clients stream. With two ranks the engine's own run is over two as well.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

CLIENTS = 64


def requests(seed: int) -> Iterator[tuple[list[int], int]]:
    """Prompts of 4 to 200 ids and 8 to 64 new tokens, without end."""
    rng = random.Random(seed)
    while True:
        yield [rng.randrange(32, 127) for _ in range(rng.randrange(4, 200))], rng.randrange(8, 65)


async def ask_for(
    url: str, headers: dict[str, str], seconds: float, clients: int = CLIENTS
) -> tuple[int, Counter[str], float]:
    """New tokens, requests by what became of them, and seconds."""
    every, found, tokens = requests(0), Counter[str](), 0
    began = time.monotonic()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        nonlocal tokens
        while time.monotonic() < began + seconds:
            prompt, new = next(every)
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
            if number % 2:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            answer = await http.post("/v1/completions", json=body)
            if answer.status_code != 200:
                found[f"status {answer.status_code}"] += 1
                continue
            whole = answer.json() if number % 2 == 0 else json.loads(answer.text.split("data: ")[-2])
            made = whole.get("usage", {}).get("completion_tokens")
            found["finished" if made == new else "wrong"] += 1
            tokens += made or 0

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as http,
        asyncio.TaskGroup() as group,
    ):
        for number in range(clients):
            group.create_task(client(number, http))
    return tokens, found, time.monotonic() - began


def engine_alone(tp: Any, folder: str, seconds: float) -> tuple[int, float]:
    """New tokens of an engine that always has as many requests as there are clients, and seconds."""
    import torch

    from tp_mamba import MambaForCausalLM, SamplingParams, load_tokenizer
    from tp_mamba.engine.engine import Engine
    from tp_mamba.engine.leader import Leader, follow

    model = MambaForCausalLM.from_pretrained(folder, tp=tp, dtype=torch.float32)
    engine = Engine(model, load_tokenizer(folder))
    if tp.rank > 0:
        follow(engine, tp)
        return 0, 0.0
    with Leader(engine, tp) as leader:
        every, tokens, running, began = requests(0), 0, 0, time.monotonic()
        while running or time.monotonic() < began + seconds:
            while running < CLIENTS and time.monotonic() < began + seconds:
                prompt, new = next(every)
                leader.add_request(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
                running += 1
            for event in leader.step():
                tokens += 1
                running -= event.finish_reason is not None
        return tokens, time.monotonic() - began


def main(folder: str, size: int, seconds: float, rounds: int = 2) -> None:
    """Alternate the two."""
    import os

    os.environ["OMP_NUM_THREADS"] = "1"
    from rank_pool import RankPool, SingleRank
    from server_process import ServerProcess

    server = ServerProcess(Path(folder), size)
    pool = RankPool(size) if size > 1 else SingleRank()
    import torch

    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            alone, took = pool.run(engine_alone, folder, seconds, timeout=3 * seconds + 60)[0]
            tokens, found, lasted = asyncio.run(ask_for(server.url, server.headers, seconds))
            rate, own = tokens / lasted, alone / took
            print(
                f"served {rate:.0f} tokens/s, engine {own:.0f}, ratio {rate / own:.2f}; {dict(found)}",
                flush=True,
            )
    finally:
        server.kill()
        pool.close()


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    multiprocessing.set_start_method("spawn")
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
