"""Requests that join and leave an engine at random, and what each of them says alone."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import torch
from step_traffic import small_model

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.params import SamplingParams
from tp_mamba.options import CacheConfig
from tp_mamba.parallel.group import TensorParallel

Asked = tuple[list[int], SamplingParams, int]
"""A prompt, its parameters, its position."""


def asked(seed: int, longest: int = 9) -> Iterator[Asked]:
    """Requests without an end: prompts long and short, some of which begin alike; greedy and sampled in turn."""
    rng, beginnings = random.Random(seed), list[list[int]]()
    for number in range(1_000_000):
        begin = rng.choice(beginnings)[: rng.choice([64, 100, 200])] if len(beginnings) > 5 else []
        prompt = begin + [rng.randrange(97) for _ in range(rng.choice([1, 1, 2, 5, 20, 90]))]
        beginnings = [*beginnings[-20:], prompt]
        params = SamplingParams(
            max_new_tokens=rng.randint(1, longest),
            temperature=0.0 if number % 2 else rng.choice([0.7, 1.2]),
            top_k=rng.choice([0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            stop_token_ids=(5, 6),
            seed=number,
        )
        yield prompt, params, rng.randrange(1000)


def keeping() -> CacheConfig:
    return CacheConfig(enable_prefix_caching=True, mamba_block_size=64)


def differing(
    tp: TensorParallel, count: int, seed: int, options: dict[str, Any]
) -> tuple[list[str], dict[str, int]]:
    """Which of ``count`` requests, served together in float32 by an engine with ``options``, say something else alone;
    and what happened on the way."""
    model, rng = small_model(torch.float32, tp), random.Random(seed)
    source, requests, found = asked(seed), list[Asked](), list[list[int | None]]()
    happened = {"aborted": 0, "tokens": 0, "most at a time": 0}
    with Engine(model, max_batch_size=6, max_prefill_tokens=70, check_steps=True, **options) as engine:
        while len(requests) < count or engine.has_work:
            if len(requests) < count and rng.random() < 0.5:
                requests.append(next(source))
                prompt, params, position = requests[-1]
                engine.add_request(prompt, params, position=position)
                found.append([])
            if engine.has_work and rng.random() < 0.04:
                engine.abort(rng.choice(list(engine._requests)))
                happened["aborted"] += 1
            events = engine.step()
            happened["most at a time"] = max(happened["most at a time"], len(events))
            for event in events:
                found[event.index].append(event.token_id)
        happened |= {"graphs": engine.captured.graphs, "reused": engine.reused_tokens}
    happened["tokens"] = sum(map(len, found))
    wrong = []
    with Engine(model, max_batch_size=1, max_prefill_tokens=300) as engine:
        for number, (prompt, params, position) in enumerate(requests):
            engine.add_request(prompt, params, position=position)
            alone = []
            while engine.has_work:
                alone += [event.token_id for event in engine.step()]
            if found[number] != alone[: len(found[number])]:  # an aborted one says the beginning
                wrong.append(f"request {number}: {found[number]} beside others, {alone} alone")
    return wrong, happened


def held_after(tp: TensorParallel, steps: int, options: dict[str, Any]) -> list[int]:
    """Bytes of the device in use after each of three runs of the same ``steps`` random steps, all requests ended.

    In the first, kernels are compiled and graphs captured, in the second those of steps that came once.

    Raises:
        AssertionError: a slot is lost, or taken twice.
    """
    model, held = small_model(torch.bfloat16, tp), []
    with Engine(model, max_batch_size=6, max_prefill_tokens=70, **options) as engine:
        for _ in range(3):
            rng, source, last = random.Random(9), asked(9), list[int]()
            for _ in range(steps):
                if rng.random() < 0.4:
                    prompt, params, position = next(source)
                    last = [*last[-12:], engine.add_request(prompt, params, position=position)]
                if last and rng.random() < 0.1:
                    engine.abort(rng.choice(last))
                engine.step()
            for index in list(engine._requests):
                engine.abort(index)
            engine.step()
            kept = 0 if engine.prefixes is None else len(engine.prefixes)
            assert engine._steps is not None
            cache = engine._steps.cache
            assert cache.num_free + kept == cache.slots, "a slot is lost"
            gc.collect()
            held.append(torch.cuda.memory_allocated() if model.device.type == "cuda" else 0)
    return held


def bits_of_hits(tp: TensorParallel, dtype: torch.dtype, count: int) -> tuple[list[str], int]:
    """Of ``count`` prompts those whose logits or states with a kept state are not, to the bit, those with nothing kept;
    and how many hit.

    Both are computed in the same pieces: the block size divides what the prompts share.
    """
    model, rng, wrong, hits = small_model(dtype, tp), random.Random(5), [], 0
    with Engine(model, max_batch_size=2, max_prefill_tokens=70, cache_config=keeping()) as engine:
        engine.start()
        assert engine._steps is not None
        assert engine.prefixes is not None
        cache, runner, seen = engine._steps.cache, engine._steps._runner, list[torch.Tensor]()
        forward = runner.forward

        def listening(schedule: Any) -> torch.Tensor:
            logits = forward(schedule)
            slots = [request.slot for request in schedule.sampling]
            seen.extend([logits.clone(), cache.conv_states[:, slots], cache.ssm_states[:, slots]])
            return logits

        def serve(prompt: list[int]) -> list[torch.Tensor]:
            seen.clear()
            engine.add_request(prompt, SamplingParams(max_new_tokens=4))
            while engine.has_work:
                engine.step()
            return [x for x in seen if x.numel()]

        runner.forward = listening  # type: ignore[method-assign]
        for number in range(count):
            begin = [rng.randrange(97) for _ in range(64 * rng.choice([1, 2]))]
            first, second = (
                begin + [rng.randrange(97) for _ in range(rng.choice([32, 33, 50]))] for _ in "12"
            )
            engine.prefixes.clear()
            miss = serve(second)
            engine.prefixes.clear()
            serve(first)
            before = engine.reused_tokens
            hit = serve(second)
            hits += engine.reused_tokens - before == len(begin)
            same = len(hit) == len(miss) and all(torch.equal(a, b) for a, b in zip(miss, hit, strict=True))
            if not same:
                wrong.append(f"prompt {number}")
    return wrong, hits
