"""Prompts that begin with the states of prompts before them say what they would say alone, for fewer tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from toy_model import ToyModel

from tp_mamba.engine import reuse
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.memory import Limits
from tp_mamba.engine.params import SamplingParams
from tp_mamba.mixer import MambaMixer
from tp_mamba.model import MambaForCausalLM
from tp_mamba.models.config import MambaConfig
from tp_mamba.options import CacheConfig
from tp_mamba.state import prefix

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])


@pytest.fixture(autouse=True)
def _short_prefixes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefix, reuse):
        monkeypatch.setattr(module, "WORTHWHILE", 3)


def keeping(block_size: int | None = 10) -> CacheConfig:
    return CacheConfig(enable_prefix_caching=True, mamba_block_size=block_size)


def drain(engine: Engine) -> dict[int, list[int | None]]:
    found: dict[int, list[int | None]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.index, []).append(event.token_id)
    return found


def prefilled(model: ToyModel) -> int:
    return sum(each.num_prefill_tokens for each in model.passes)


def ids(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(40) for _ in range(length)]


@BOTH
@pytest.mark.parametrize("snapshots", [2, 64])
def test_requests_that_join_and_leave_at_random_say_what_each_says_alone(
    overlap: bool, snapshots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_mamba.engine.room.MAX_SNAPSHOTS", snapshots)
    rng, model = random.Random(snapshots), ToyModel(eos=(3,), usable=37)
    alone: dict[int, list[int | None]] = {}
    found: dict[int, list[int | None]] = {}
    said: list[list[int]] = [[]]  # beginnings: prompts so far, and prompts with their texts
    with Engine(
        model,
        max_batch_size=4,
        max_prefill_tokens=9,
        overlap=overlap,
        check_steps=True,
        cache_config=keeping(),
    ) as engine:
        aborted = 0
        while len(alone) < 80 or engine.has_work:
            if len(alone) < 80 and rng.random() < 0.6:
                begin = rng.choice(said)[: rng.choice([100, 100, 11, 4])]
                prompt = begin + ids(rng.random(), rng.choice([1, 1, 2, 5, 20]))
                params = SamplingParams(
                    max_new_tokens=rng.randint(1, 9),
                    temperature=rng.choice([0.0, 0.9]),
                    repetition_penalty=rng.choice([1.0, 1.3]),
                    stop_token_ids=(5, 6),
                )
                index = engine.add_request(prompt, params, position=rng.randrange(1000))
                alone[index] = alone_as(engine._requests[index])
                found[index] = []
                said += [prompt, prompt + [token for token in alone[index] if token is not None]]
            if engine.has_work and rng.random() < 0.08:
                index = rng.choice(list(engine._requests))
                assert engine.abort(index)
                aborted += 1
                alone[index] = alone[index][: len(found[index])]
            for event in engine.step():
                found[event.index].append(event.token_id)
            assert len(engine.prefixes) <= snapshots
        assert aborted > 3
        assert found == alone
        assert engine.prefixes.hits > (10 if snapshots == 64 else 2)
        assert len(model.caches[0].used) == len(engine.prefixes), "a slot is lost, or freed twice"
    assert not model.caches[0].used


def alone_as(request) -> list[int | None]:
    """What this request says with the model to itself, and nothing kept."""
    with Engine(ToyModel(eos=(3,), usable=37), overlap=False) as engine:
        engine.add_request(request.prompt, request.params, position=request.position)
        return drain(engine)[0]


@BOTH
def test_what_requests_that_arrive_together_share_is_computed_once(overlap: bool) -> None:
    model, shared = ToyModel(), ids(0, 50)
    with Engine(
        model, max_batch_size=8, max_prefill_tokens=30, overlap=overlap, cache_config=keeping(None)
    ) as engine:
        for seed in range(1, 9):
            engine.add_request(shared + ids(seed, 6), SamplingParams(max_new_tokens=4))
        drain(engine)
        assert engine.prefixes.hits == 7
    assert prefilled(model) == 50 + 8 * 6


def test_a_prompt_that_arrives_in_time_has_its_beginning_kept_by_the_one_before() -> None:
    model, shared = ToyModel(), ids(0, 50)
    with Engine(model, max_prefill_tokens=10, overlap=False, cache_config=keeping(None)) as engine:
        engine.add_request(shared + ids(1, 30), SamplingParams(max_new_tokens=4))
        for _ in range(2):
            engine.step()
        engine.add_request(shared + ids(2, 6), SamplingParams(max_new_tokens=4))
        drain(engine)
    assert prefilled(model) == 80 + 6


@BOTH
def test_a_junction_is_kept_where_a_later_prompt_parts(overlap: bool) -> None:
    model, shared = ToyModel(), ids(0, 50)
    with Engine(model, overlap=overlap, cache_config=keeping(None)) as engine:
        for seed, computed in ((1, 56), (2, 56), (3, 6), (4, 6)):
            model.passes.clear()
            engine.add_request(shared + ids(seed, 6), SamplingParams(max_new_tokens=4))
            drain(engine)
            assert prefilled(model) == computed, f"prompt {seed}"


@BOTH
@pytest.mark.parametrize("ended_by", ["length", "stop"])
def test_every_turn_of_a_conversation_computes_its_own_tokens_only(overlap: bool, ended_by: str) -> None:
    model = ToyModel()
    with Engine(model, overlap=overlap, cache_config=keeping(None)) as engine:
        talk: list[int] = []
        for turn in range(10):
            talk += ids(turn, 7)
            params = SamplingParams(max_new_tokens=6)
            if ended_by == "stop":  # by its fourth token, which is known to the host late
                engine.add_request(talk, params)
                fourth = drain(engine)[engine._added - 1][3]
                params = SamplingParams(max_new_tokens=6, stop_token_ids=(fourth,))
            model.passes.clear()
            engine.add_request(talk, params)
            answer = drain(engine)[engine._added - 1]
            if ended_by == "length" and turn:
                # of what came before, only the last token of the last answer has not been read
                assert prefilled(model) == 7 + 1
            elif turn:
                assert prefilled(model) <= 7 + 1
            talk += answer


def test_a_text_that_failed_or_was_dropped_is_not_kept() -> None:
    model = ToyModel()
    with Engine(model, overlap=True, cache_config=keeping(None)) as engine:
        model.spoils = lambda number, slot: number == 3
        engine.add_request(ids(1, 5), SamplingParams(max_new_tokens=9))
        drain(engine)
        index = engine.add_request(ids(2, 5), SamplingParams(max_new_tokens=9))
        for _ in range(3):
            engine.step()
        engine.abort(index)
        kept = [tokens.tolist() for tokens, _ in engine.prefixes.snapshots()]
        assert kept == [ids(1, 5), ids(2, 5)], "the prompts are, what came after them is not"


CONFIG = MambaConfig(
    model_type="mamba", hidden_size=12, intermediate_size=24, num_hidden_layers=2, state_size=4,
    conv_kernel=4, time_step_rank=2, vocab_size=40,
)  # fmt: skip


def model_of_float64(cache_config: CacheConfig | None = None) -> MambaForCausalLM:
    torch.manual_seed(0)
    model = MambaForCausalLM(CONFIG, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter is not model.backbone.embeddings.weight:
                parameter.mul_(3)
    for mixer in model.mixers():
        mixer.cache_config = cache_config
    return model


def test_a_real_model_says_the_same_and_goes_on_from_the_disk(tmp_path: Path) -> None:
    shared, params = ids(0, 40), SamplingParams(max_new_tokens=8)
    prompts = [shared + ids(seed, 1 + seed) for seed in range(1, 5)]
    plain = [result.token_ids for result in model_of_float64().generate(prompts, params)]
    with Engine(model_of_float64(), cache_config=keeping(16)) as engine:
        for prompt in prompts:
            engine.add_request(prompt, params)
        assert list(drain(engine).values()) == plain
        assert engine.prefixes.hits == 3
        saved = engine.save_prefixes(tmp_path)
        assert saved == len(engine.prefixes) > 4
    with Engine(model_of_float64(), cache_config=keeping(16)) as engine:
        assert engine.load_prefixes(tmp_path) == saved
        for prompt in prompts:
            engine.add_request(prompt, params)
        assert list(drain(engine).values()) == plain
        assert engine.prefixes.hits == 4


def test_the_mixers_say_whether_prefixes_are_kept(tmp_path: Path) -> None:
    with Engine(model_of_float64(keeping(16))) as engine:
        engine.start()
        assert engine.prefixes.block_size == 16
    with Engine(model_of_float64()) as engine:
        engine.start()
        assert engine.prefixes is None
        with pytest.raises(ValueError, match="keeps no prefixes: make it with cache_config="):
            engine.save_prefixes(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (CacheConfig(mamba_block_size=64), "64 but no states are kept: set enable_prefix_caching too"),
        (
            CacheConfig(mamba_block_size=0, enable_prefix_caching=True),
            "0: it is a number of tokens, at least 1",
        ),
    ],
)
def test_options_that_keep_nothing_are_refused(options: CacheConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"mixer 7: cache_config.mamba_block_size is {sentence}"):
        MambaMixer(6, 4, 3, 14, 2, True, False, False, cache_config=options, prefix="mixer 7")


def test_what_fits_is_divided_between_sequences_and_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    def room_for_8(*_: object, max_batch_size: int, max_prefill_tokens: int, **__: object) -> Limits:
        return Limits(min(8, max_batch_size), max_prefill_tokens, None)

    monkeypatch.setattr("tp_mamba.engine.room.agree_on_limits", room_for_8)
    for asked, expected in ((None, (6, 2)), (8, (6, 2)), (3, (3, 5))):
        with Engine(ToyModel(), max_batch_size=asked, cache_config=keeping()) as engine:
            engine.start()
            assert (engine.max_batch_size, engine.prefixes.capacity) == expected
