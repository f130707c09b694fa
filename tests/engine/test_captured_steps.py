"""Padded and captured steps of the real model: the bits of the eager call, the text of the exact shapes."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from rank_pool import RankPool
from step_traffic import BUDGET, SLOTS, padded, schedules, side_by_side, small_model

from tp_mamba.engine.buffers import StepInputs
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.graphs import CaptureWarning, CudaCapture
from tp_mamba.engine.ladder import Rung
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.runner import Runner
from tp_mamba.engine.scheduler import Chunk, Schedule
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel


def exact(model: MambaForCausalLM, cache: object) -> Runner:
    return Runner(model, cache, SLOTS, BUDGET, check_steps=True)


def test_the_trace_has_steps_of_every_kind() -> None:
    """Keeps the tests below able to fail."""
    decodes_only = several_prompts = goes_on = 0
    for schedule in schedules(small_model(torch.float32).new_cache(SLOTS), 150, seed=1):
        decodes_only += not schedule.chunks
        several_prompts += len(schedule.chunks) > 1 and bool(schedule.decodes)
        goes_on += any(chunk.start for chunk in schedule.chunks) and bool(schedule.decodes)
        for chunk in schedule.chunks:
            chunk.request.taken += chunk.length
    assert min(decodes_only, several_prompts, goes_on) > 10


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    if not one.numel():
        return 0.0
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()


def test_padding_changes_nothing_but_rounding() -> None:
    """On a CPU, in float64: exact shapes beside padded ones, where decode rows go as prompts in mixed steps."""
    make = (exact, partial(padded, capture=None))
    for _, logits, expected, twins in side_by_side(small_model(torch.float64), make, 18, seed=2):
        assert distance(logits, expected) < 1e-12
        one, other = twins.caches
        assert distance(one.conv_states, other.conv_states) < 1e-12
        assert distance(one.ssm_states, other.ssm_states) < 1e-12


def test_nothing_waits_for_a_garbage_collection() -> None:
    """States and graphs are the largest things that an engine holds."""
    model = small_model(torch.float32)
    cache = model.new_cache(SLOTS)
    runner = padded(model, cache, lambda run: lambda: None)
    request = Request(0, [1, 2, 3], SamplingParams(), slot=cache.allocate())
    with torch.inference_mode():
        for _ in range(3):
            runner.forward(Schedule([], [Chunk(request, 0, 3)], []))
    assert runner.captured.graphs == 2
    held = weakref.ref(cache)
    gc.disable()
    try:
        del runner, cache
        assert held() is None
    finally:
        gc.enable()


PROMPTS = [[5, 17, 33, 2, 80, 41, 9], [60], [12, 13, 14], list(range(90)), [7, 8]]
SETTINGS = [
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=30, temperature=0.8, seed=5),
    SamplingParams(max_new_tokens=25, temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=6),
    SamplingParams(max_new_tokens=3),
    SamplingParams(max_new_tokens=30, stop_token_ids=tuple(range(0, 97, 9))),
]


def texts(model: MambaForCausalLM, times: int = 2, **options: object) -> list[list[int]]:
    results = model.generate(
        PROMPTS * times, SETTINGS * times, max_batch_size=7, max_prefill_tokens=64, **options
    )
    return [result.token_ids for result in results]


def test_texts_are_those_of_working_in_step() -> None:
    model = small_model(torch.float32)
    expected = texts(model, 1)
    assert len({tuple(ids) for ids in expected}) == 5, "this model says the same whatever it reads"
    assert texts(model, 1, overlap=True) == expected


def captured_differ(tp: TensorParallel, dtype: torch.dtype, steps: int, seed: int) -> tuple[list[int], int]:
    """Steps of a random trace whose logits, or the states after them, differ from the eager call of the same capacity;
    and how many graphs were replayed."""
    model, captured = small_model(dtype, tp), []

    def capturing(model: MambaForCausalLM, cache: object) -> Runner:
        captured.append(padded(model, cache, CudaCapture(model.device)))
        return captured[0]

    wrong = []
    make = (capturing, partial(padded, capture=None))
    for number, (_, logits, expected, twins) in enumerate(side_by_side(model, make, steps, seed)):
        if not torch.equal(logits, expected) or (number % 8 == 0 and twins.differ()):
            wrong.append(number)
    return wrong, captured[0].captured.graphs


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 2000), (torch.float32, 300)], ids=str)
def test_a_replay_gives_the_bits_of_the_eager_call(dtype: torch.dtype, steps: int) -> None:
    tp = TensorParallel(device=torch.device("cuda", torch.cuda.current_device()))
    wrong, graphs = captured_differ(tp, dtype, steps, seed=3)
    assert wrong == []
    assert graphs > 8


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rung", [Rung(8, 8, decodes=True), Rung(48, 8, decodes=False)], ids=str)
@torch.inference_mode()
def test_a_rows_bits_do_not_depend_on_what_else_the_rung_holds(device: str, rung: Rung) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = small_model(dtype, TensorParallel(device=device))
    found = []
    for others in (0, 2, 7):
        cache = model.new_cache(9)
        capture = CudaCapture(model.device) if device == "cuda" else None
        runner = padded(model, cache, capture)
        cache.conv_states.normal_(generator=torch.Generator(device).manual_seed(1))
        cache.ssm_states.normal_(generator=torch.Generator(device).manual_seed(2))
        slots = [4, *(slot for slot in range(9) if slot not in (2, 4))][: others + 1]
        step = StepInputs(slots, wanted=list(range(len(slots))))
        step.places.extend([11, *range(20, 20 + others)])
        step.answers.extend(97 + slot for slot in slots)
        if not rung.decodes and others == 7:  # one of them takes in a prompt
            step.decode_slots.remove(slots[-1])
            step = dataclasses.replace(
                step,
                prefill_slots=[slots[-1]],
                prefill_lengths=[30],
                continues=[False],
                places=step.places[:-1] + [5] * 30,
                wanted=[*range(7), 36],
            )
        untouched = [cache.conv_states[:, 2].clone(), cache.ssm_states[:, 2].clone()]
        for _ in range(3):
            logits = runner._run(step, rung)
        found.append([logits[0].clone(), cache.conv_states[:, 4].clone(), cache.ssm_states[:, 4].clone()])
        assert torch.equal(untouched[0], cache.conv_states[:, 2])
        assert torch.equal(untouched[1], cache.ssm_states[:, 2])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
def test_texts_with_and_without_graphs() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = small_model(torch.float32, TensorParallel(device=device))
    expected = texts(model, eager=True, overlap=False)
    assert len({tuple(ids) for ids in expected}) > 5
    for options in ({}, {"overlap": False}, {"eager": True}):
        assert texts(model, **options) == expected, options
    with Engine(model, max_batch_size=3, max_prefill_tokens=16, check_steps=True) as engine:
        for position, (prompt, params) in enumerate(zip(PROMPTS * 2, SETTINGS * 2, strict=True)):
            engine.add_request(prompt, params, position=position)
        found: dict[int, list[int]] = {}
        while engine.has_work:
            for event in engine.step():
                found.setdefault(event.index, []).append(event.token_id)
        assert engine.captured.graphs > 3
        assert [found[index] for index in range(len(expected))] == expected


@pytest.mark.gpu
def test_a_layer_that_cannot_be_captured_runs_eagerly() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = small_model(torch.float32, TensorParallel(device=device))
    expected = texts(model, eager=True)
    norm = model.backbone.norm_f
    right = norm.add

    def looking(*args: object, **options: object) -> object:
        result = right(*args, **options)
        result[0].sum().item()  # asks the device, which a capture forbids
        return result

    norm.add = looking
    with pytest.warns(CaptureWarning, match="could not be captured") as warned:
        found = texts(model)
    assert len(warned) == 1
    assert found == expected
    norm.add = right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(model) == expected


@pytest.mark.gpu
def test_closing_gives_the_memory_of_the_graphs_back() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = small_model(torch.float32, TensorParallel(device=device))
    held = []
    for _ in range(4):
        texts(model)
        gc.collect()
        held.append(torch.cuda.memory_allocated(device))
    assert held[-1] == held[1]


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()


@pytest.mark.gpu
@pytest.mark.multigpu
def test_a_replay_over_two_gpus_gives_the_bits_of_the_eager_call(gpus: RankPool) -> None:
    for wrong, graphs in gpus.run(captured_differ, torch.bfloat16, 200, 3):
        assert wrong == []
        assert graphs > 8


def _texts(tp: TensorParallel, options: dict[str, object]) -> list[list[int]]:
    return texts(small_model(torch.float32, tp), **options)


@pytest.mark.gpu
@pytest.mark.multigpu
def test_texts_over_two_gpus(gpus: RankPool) -> None:
    expected = _texts(TensorParallel(), {"eager": True, "overlap": False})
    for options in ({}, {"eager": True}, {"overlap": False}):
        assert gpus.run(_texts, options) == [expected] * 2, options
