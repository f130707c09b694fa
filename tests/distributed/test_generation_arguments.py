"""Ranks that generate with different arguments, and threads that want one group, are told so and do not hang."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import save_case

from tp_mamba.engine import engine, memory
from tp_mamba.engine.params import SamplingParams
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

PROMPTS = [[5, 17, 33], [60, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_case("mamba", path)
    return path


def _generate(tp: TensorParallel, folder: Path, calls: list[dict[str, Any]]) -> list[str]:
    """What each rank is told about its own call of ``calls``; then that the ranks still generate together."""
    model = MambaForCausalLM.from_pretrained(folder, tp)
    try:
        model.generate(**{"prompts": PROMPTS, "max_new_tokens": 3, **calls[tp.rank]})
        told = "generated"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return [told, str(model.generate(PROMPTS, max_new_tokens=2))]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"prompts": [[5, 17, 33], [60, 3]]},
            "prompt 1 differs between the ranks, rank 0 was given [60, 2] and ",
        ),
        (
            {"prompts": PROMPTS[:1]},
            "the number of prompts differs between the ranks, rank 0 was given 2 and rank",
        ),
        (
            {"seed": 3},
            "seed differs between the ranks, rank 0 was given 0 and rank 1 3: give every rank the same",
        ),
        (
            {"max_new_tokens": 4},
            "max_new_tokens differs between the ranks, rank 0 was given 3 and rank 1 4: g",
        ),
        (
            {"params": [SamplingParams(), SamplingParams(top_k=5)]},
            "top_k differs between the ranks, rank 0 was given 0 and rank 1 [0, 5]: give every rank the same",
        ),
        (
            {"max_batch_size": 1},
            "max_batch_size differs between the ranks, rank 0 was given None and rank 1 1: g",
        ),
        (
            {"max_prefill_tokens": 2},
            "max_prefill_tokens differs between the ranks, rank 0 was given 8192 and ra",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_rank_is_told_what_differs(ranks, folder: Path, other: dict[str, Any], message: str) -> None:
    (first, again), (second, also) = ranks(2).run(_generate, folder, [{}, other])
    assert first.startswith(f"ValueError: {message}")
    assert second == first
    assert again == also


def test_arguments_that_one_rank_refuses_stop_them_all(ranks, folder: Path) -> None:
    (first, _), (second, _) = ranks(2).run(_generate, folder, [{"prompts": [[1], [99]]}, {}])
    assert first.startswith("ValueError: prompt 1 holds the id 99")
    assert second.startswith("RankFailedError: rank 0 of 2 failed: ValueError: prompt 1 holds the id 99")


def _generate_with_little_memory(tp: TensorParallel, folder: Path, rooms: list[int]) -> tuple[int, int]:
    model = MambaForCausalLM.from_pretrained(folder, tp)
    needs = memory.Needs.of(model)
    with pytest.MonkeyPatch.context() as patch:
        room = needs.token + rooms[tp.rank] * (needs.sequence + needs.token)
        patch.setattr(memory, "free_memory", lambda device: tp.size * room)
        events = model.stream([[1]] * 20, max_new_tokens=2, max_prefill_tokens=1, memory_fraction=1)
        return events.max_batch_size, len(list(events))


def test_all_ranks_bound_the_batch_by_the_one_with_the_least_memory(ranks, folder: Path) -> None:
    assert ranks(3).run(_generate_with_little_memory, folder, [9, 4, 7]) == [(4, 40)] * 3


def _no_room_on_one_rank(tp: TensorParallel, folder: Path) -> str:
    model = MambaForCausalLM.from_pretrained(folder, tp)
    if tp.rank == 1:
        model.new_cache = lambda slots: torch.empty(2**60)
    try:
        model.generate(PROMPTS, max_new_tokens=2)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "generated"


def test_one_rank_without_room_for_its_state_stops_them_all(ranks, folder: Path) -> None:
    told = ranks(2).run(_no_room_on_one_rank, folder)
    assert told[0].startswith("RankFailedError: rank 1 of 2 failed: RuntimeError")
    assert told[1].startswith("RuntimeError")


def _two_threads(tp: TensorParallel, folder: Path) -> list[str]:
    model, told = MambaForCausalLM.from_pretrained(folder, tp), []

    def generate() -> None:
        try:
            told.append(str(len(model.generate(PROMPTS, max_new_tokens=2))))
        except ValueError as error:
            told.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()

    events = model.stream(PROMPTS, max_new_tokens=3)
    next(events)
    in_a_thread()
    generate()  # this thread does the same on every rank
    events.close()
    in_a_thread()
    events = model.stream(PROMPTS, max_new_tokens=3)
    del events
    in_a_thread()
    with engine.Engine(model) as held:
        held.start()
        in_a_thread()
    in_a_thread()
    return told


def test_one_thread_generates_over_a_group_at_a_time(ranks, folder: Path) -> None:
    refused = "generating over a process group that another thread is generating over: let that end first"
    for told in ranks(2).run(_two_threads, folder):
        assert [text if text == "2" else text[: len(refused)] for text in told] == [
            refused, "2", "2", "2", refused, "2",
        ]  # fmt: skip
