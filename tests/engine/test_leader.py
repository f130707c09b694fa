"""Requests that rank 0 alone knows of: every rank serves them, and one rank's result is that of an engine alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from toy_model import ToyModel, prompts_of

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.leader import Leader, follow
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import TokenEvent
from tp_mamba.parallel import words
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.words import WordsOfRank0

REQUESTS = 40


def serve(engine: Any, seed: int) -> dict[int, list[TokenEvent]]:
    """Requests that come and go at random, with parameters of their own; the events of each."""
    rng, events, added = random.Random(seed), dict[int, list[TokenEvent]](), 0
    while added < REQUESTS or engine.has_work:
        for _ in range(rng.randrange(4)):
            if added < REQUESTS:
                params = SamplingParams(
                    max_new_tokens=rng.randint(1, 9), temperature=rng.choice([0, 0.8]), seed=added
                )
                (prompt,) = prompts_of([rng.randint(1, 12)], seed=added)
                events[engine.add_request(prompt, params, position=added)] = []
                added += 1
        if rng.random() < 0.2:
            engine.abort(rng.randrange(added + 1))  # perhaps one that has ended, or never was
        with pytest.raises(ValueError, match="holds the id 99"):
            engine.add_request([99])
        for event in engine.step():
            events[event.index].append(event)
    return events


def _lead(tp: TensorParallel, seed: int) -> tuple[Any, list[list[int]]]:
    model = ToyModel(tp=tp)
    engine = Engine(model, max_batch_size=3, max_prefill_tokens=7)
    if tp.rank > 0:
        follow(engine, tp)
        events = None
    else:
        with Leader(engine, tp) as leader:
            assert leader.max_batch_size == 3
            assert leader.step() == []  # a sign of life
            events = serve(leader, seed)
    assert not model.caches[0].used, "slots are left in use"
    return events, [metadata.query_start_loc.tolist() for metadata in model.passes]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_makes_the_passes_of_one_engine(ranks, size: int) -> None:
    alone = ToyModel()
    with Engine(alone, max_batch_size=3, max_prefill_tokens=7) as engine:
        expected = serve(engine, seed=size)
    passes = [metadata.query_start_loc.tolist() for metadata in alone.passes]
    results = ranks(size).run(_lead, size)
    assert results[0] == (expected, passes)
    assert all(result == (None, passes) for result in results[1:])
    assert sum(len(events) > 1 for events in expected.values()) > REQUESTS / 2


def _pass_on(tp: TensorParallel, lengths: list[int]) -> list[bool]:
    channel = WordsOfRank0(tp)
    sent = [bytes(length) + b"end" for length in lengths]
    told = [channel.pass_on(word if tp.rank == 0 else None) == word for word in sent]
    channel.close()
    return told


def test_words_of_any_length_arrive_whole(ranks) -> None:
    around = range(words.INLINE_BYTES - 60, words.INLINE_BYTES + 20)  # a short pickle adds some 20 bytes
    lengths = [0, *around, 300_000]
    for told in [*ranks(1).run(_pass_on, lengths), *ranks(3).run(_pass_on, lengths)]:
        assert told == [True] * len(lengths)


def _fail(tp: TensorParallel) -> str:
    engine = Engine(ToyModel(tp=tp), max_batch_size=2)
    try:
        if tp.rank > 0:
            follow(engine, tp)
        else:
            with Leader(engine, tp) as leader:
                leader.add_request([1, 2], SamplingParams(max_new_tokens=50))
                leader.step()
                raise OSError("the disk is full")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ended"


def test_an_error_of_rank_0_ends_the_others(ranks) -> None:
    told = ranks(2).run(_fail)
    assert told == [
        "OSError: the disk is full",
        "RankFailedError: rank 0 of 2 failed: OSError: the disk is full",
    ]


def test_only_rank_0_leads() -> None:
    tp = TensorParallel.virtual(1, 2)
    with pytest.raises(ValueError, match=r"^rank 1 cannot lead: rank 0 does, and the others call follow"):
        Leader(Engine(ToyModel(tp=tp)), tp)
