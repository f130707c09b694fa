"""What fits into memory: numbers worked out by hand, free memory that is made up, and what activations really take."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from toy_model import ToyModel, prompts_of

from tp_mamba.batch import whole_sequences
from tp_mamba.config import MambaConfig
from tp_mamba.engine import memory
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.generate import generate, stream
from tp_mamba.engine.memory import ClampedWarning, Limits, MemoryShortError, Needs, choose_limits
from tp_mamba.engine.room import MAX_BATCH_SIZE
from tp_mamba.model import MambaForCausalLM
from tp_mamba.models.activations import PeakMemory, activation_bytes_per_token

NEEDS = Needs(weights=10_000, sequence=900, token=100)


def choose(free: int | None, needs: Needs = NEEDS, **asked: float) -> Limits:
    given = {"max_batch_size": 8, "max_prefill_tokens": 200, "fraction": 1.0, "where": "it has 1 B free"}
    return choose_limits(needs, free, **(given | asked))  # type: ignore[arg-type]


def test_all_that_is_asked_for_where_it_fits_or_nobody_knows() -> None:
    # Weights, 200 tokens of prompts, and for each sequence its state and the token that it decodes.
    assert choose(10_000 + 200 * 100 + 8 * 1000) == Limits(8, 200)
    assert choose(None) == Limits(8, 200)


@pytest.mark.parametrize(
    ("room", "sequences", "tokens"),
    [
        (27_999, 8, 199),  # the sequences first, as long as half of the room is left to activations
        (16_000, 8, 80),
        (15_000, 7, 75),
        (13_000, 6, 65),
        (8_000, 1, 64),  # a step of fewer tokens would not be worth its weights
        (7_400, 1, 64),
    ],
)
def test_what_is_lowered(room: int, sequences: int, tokens: int) -> None:
    for fraction in (1.0, 0.5):
        limits = choose(int((10_000 + room) / fraction), fraction=fraction)
        assert (limits.max_batch_size, limits.max_prefill_tokens) == (sequences, tokens)
        assert limits.note is not None
        assert ("sequences run at a time" in limits.note) == (sequences < 8)
        assert f"{tokens} instead of 200 prompt tokens are taken in a step: it has 1 B free" in limits.note
        assert "9.77 KiB of it for weights" in limits.note
        assert sequences * 1000 + tokens * 100 <= room


def test_no_room_for_one_sequence_is_refused_before_loading_and_never_afterwards() -> None:
    with pytest.raises(MemoryShortError) as refused:
        choose(17_399)
    assert str(refused.value) == (
        "it has 1 B free, a fraction of 1 of it may be used, and 9.77 KiB of weights with one sequence take 16.99 KiB: "
        "use more ranks, a narrower dtype, or a device with more memory"
    )
    for free in (0, 50, 7_399):
        limits = choose(free, Needs(weights=0, sequence=900, token=100))
        assert (limits.max_batch_size, limits.max_prefill_tokens) == (1, 64)
    assert choose(0, Needs(weights=0, sequence=900, token=100), max_prefill_tokens=3).max_prefill_tokens == 3


def test_captured_steps_take_what_they_need_and_at_most_half() -> None:
    needs = Needs(weights=2**30, sequence=2**20, token=2**17, captures=True)
    plenty = choose(2**36, needs, max_batch_size=256, max_prefill_tokens=8192)
    assert plenty == Limits(256, 8192)
    # 2 GiB besides the weights: 1 GiB of them activations, half of the rest captured steps.
    short = choose(3 * 2**30, needs, max_batch_size=1000, max_prefill_tokens=8192)
    assert (short.max_batch_size, short.max_prefill_tokens) == (2**29 // (2**20 + 2**17), 8192)


def test_sequences_of_a_model_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = ToyModel(), prompts_of([2] * 9)
    expected = generate(model, prompts, max_new_tokens=3)
    needs = Needs.of(model)
    assert needs == Needs(weights=0, sequence=64 + memory._SAMPLING_BYTES * 40, token=100)
    room = 4 * (needs.sequence + 100) + 5 * 100
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    limits = {"max_prefill_tokens": 5, "memory_fraction": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody asked for more
        events = stream(model, prompts, max_new_tokens=3, **limits)
    assert events.max_batch_size == 4
    assert [event.index for event in events].count(8) == 3
    assert [len(cache.states) for cache in model.caches] == [9, 4]
    assert generate(model, prompts, max_new_tokens=3, **limits) == expected
    with pytest.warns(
        ClampedWarning, match=r"^4 instead of 6 sequences run at a time: the CPU's memory has .* free"
    ):
        assert stream(model, prompts, max_batch_size=6, **limits).max_batch_size == 4
    assert stream(model, prompts[:2], max_new_tokens=3, **limits).max_batch_size == 2
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with pytest.warns(
        ClampedWarning, match="1 instead of 9 sequences run at a time and 64 instead of 8,192 prompt"
    ):
        assert stream(model, prompts).max_batch_size == 1
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert stream(model, prompts).max_batch_size == 9
    for asked, chosen in ((None, MAX_BATCH_SIZE), (1000, 1000)):
        with Engine(model, max_batch_size=asked) as engine:
            engine.start()
            assert (engine.max_batch_size, engine.max_prefill_tokens) == (chosen, 8192)


@pytest.mark.parametrize("fraction", [0, 1.1, float("nan"), "half"])
def test_a_fraction_that_is_none(fraction: object) -> None:
    with pytest.raises(ValueError, match=r"^memory_fraction"):
        Engine(ToyModel(), memory_fraction=fraction)  # type: ignore[arg-type]


def test_free_memory_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**50
    limit, usage = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "_CGROUPS", [(str(limit), str(usage))])
    limit.write_text("5000\n")
    usage.write_text("2000\n")
    assert memory.free_memory(torch.device("cpu")) == 3000
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 300\ninactive_file 400\n")
    assert memory.free_memory(torch.device("cpu")) == 3700
    limit.write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 2**20


@pytest.mark.gpu
def test_free_memory_of_a_gpu_counts_what_torch_keeps() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    with_held = memory.free_memory(device)
    del held  # torch keeps the block
    assert memory.free_memory(device) - with_held >= 2**28


CONFIG = MambaConfig(
    model_type="mamba",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    state_size=16,
    conv_kernel=4,
    time_step_rank=8,
)


def test_peak_memory_counts_what_is_alive() -> None:
    x = torch.zeros(1000)
    with PeakMemory() as found:
        y = x + 1
        z = y.view(10, 100).t()  # no storage of its own
        del y
        z.add_(1)
        w = x * 2
        del z
        torch.cat([w, w])
    assert found.peak == 3 * 4000


def test_activations_take_on_the_meta_device_what_they_take_on_a_cpu() -> None:
    model = MambaForCausalLM(CONFIG, dtype=torch.float32, device="cpu")
    tokens = 512
    with torch.inference_mode(), PeakMemory() as found:
        model.backbone(torch.zeros(tokens, dtype=torch.int64), whole_sequences(1, tokens, model.device), None)
    measured = found.peak / tokens
    assert 0.95 * measured < model.activation_bytes_per_token < 1.05 * measured
    # At least x and z, u, dt and y of a layer's channels; a rank of two holds half of those.
    assert model.activation_bytes_per_token > 5 * 4 * 256
    half = activation_bytes_per_token(CONFIG, 2, torch.float32)
    assert 0.5 * measured < half < 0.9 * measured
