"""Logprobs of new tokens and of prompts against a float64 log-softmax of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from model_factory import save_case
from test_engine import drain
from test_prefix_reuse import keeping
from toy_model import ToyModel, prompts_of

from tp_mamba.engine import prompt_scores
from tp_mamba.engine.cut_vocabulary import CutVocabulary
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.generate import GenerationResult, generate
from tp_mamba.engine.logprobs import score_rows
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.token_logprob import TokenLogprob, described
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])


def check(found: TokenLogprob, logits: torch.Tensor, token: int, top: int, usable: int) -> None:
    """``found`` is about ``token`` where the logits were ``logits [V]``."""
    expected = logits.double().log_softmax(-1)
    assert found.token_id == token
    assert found.logprob == pytest.approx(expected[token].item(), abs=1e-6)
    order = sorted(range(usable), key=lambda id_: (-logits[id_].item(), id_))[:top]
    assert [id_ for id_, _ in found.top] == order
    for id_, logprob in found.top:
        assert logprob == pytest.approx(expected[id_].item(), abs=1e-6)
        if id_ == token:
            assert logprob == found.logprob  # the very float


@BOTH
@pytest.mark.parametrize("budget", [4, 100])
def test_of_new_tokens_and_of_prompts(overlap: bool, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scores, "ROWS", 3)
    model, prompts = ToyModel(usable=37), prompts_of([3, 1, 9, 14, 5, 7])
    asked = [(2, 1, 0), (0, 0, 0), (None, 20, 4), (20, None, 0), (None, None, 0), (1, 0, 6)]
    settings = [
        SamplingParams(
            max_new_tokens=5,
            logprobs=logprobs,
            prompt_logprobs=of_prompt,
            prompt_logprobs_start=start,
            temperature=0.9 * (i % 2),
            repetition_penalty=1.3,  # the logprobs are those of the model alone
            logit_bias={3: 7.0},
        )
        for i, (logprobs, of_prompt, start) in enumerate(asked)
    ]
    results = generate(model, prompts, settings, max_batch_size=3, max_prefill_tokens=budget, overlap=overlap)
    assert model.most_rows <= 3, "few rows of logits at a time"
    plain = [
        SamplingParams(
            max_new_tokens=5, temperature=0.9 * (i % 2), repetition_penalty=1.3, logit_bias={3: 7.0}
        )
        for i in range(6)
    ]
    expected = generate(ToyModel(usable=37), prompts, plain)
    for prompt, result, params, free in zip(prompts, results, settings, expected, strict=True):
        assert result.token_ids == free.token_ids
        assert (result.logprobs is None) == (params.logprobs is None)
        for i, found in enumerate(result.logprobs or ()):
            logits = model.whole(prompt + result.token_ids[:i])
            check(found, logits, result.token_ids[i], params.logprobs, 37)
        assert (result.prompt_logprobs is None) == (params.prompt_logprobs is None)
        if result.prompt_logprobs is not None:
            start = params.prompt_logprobs_start
            assert len(result.prompt_logprobs) == len(prompt) - start
            for i, found in enumerate(result.prompt_logprobs, start):
                if i == 0:
                    assert found is None
                else:
                    check(found, model.whole(prompt[:i]), prompt[i], params.prompt_logprobs, 37)


@BOTH
def test_kept_states_are_used_for_what_is_not_asked_about(overlap: bool) -> None:
    (prompt,) = prompts_of([90])
    with Engine(ToyModel(), cache_config=keeping(), overlap=overlap) as engine:
        engine.add_request(prompt[:80], SamplingParams(max_new_tokens=1))
        drain(engine)
        for start, reused in ((81, 80), (80, 40), (40, 0), (0, 0)):
            before = engine.reused_tokens
            params = SamplingParams(max_new_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start)
            index = engine.add_request(prompt, params)
            (event,) = drain(engine)[index]
            assert engine.reused_tokens - before == reused
            assert len(event.prompt_logprobs) == 90 - start
            for i, found in enumerate(event.prompt_logprobs, start):
                if i:
                    check(found, engine._model.whole(prompt[:i]), prompt[i], 0, 40)


def _scores(tp: TensorParallel, cut_up: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(8, 50, generator=generator)
    logits[2:5] = logits[2:5].round()  # ties everywhere
    logits[5], logits[6, ::3], logits[7, 10] = 0.0, -torch.inf, -0.0
    tokens = torch.tensor([0, 49, 17, 25, 33, 48, 1, 10])
    cut = CutVocabulary.of(tp, 50, 47) if cut_up else None
    if cut is not None:
        padded = torch.full((8, tp.size * cut.width), 1e9)
        padded[:, :50] = logits
        logits = padded[:, cut.start : cut.start + cut.width]
    return score_rows(logits, tokens, 30, usable=47, cut=cut)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_cut_vocabulary_scores_as_whole_rows_do(ranks, size: int) -> None:
    whole = _scores(TensorParallel(device="cpu"), False)
    assert whole.shape == (8, 61)
    for cut in ranks(size).run(_scores, True):
        assert torch.equal(cut[:, 31:], whole[:, 31:])
        torch.testing.assert_close(cut[:, :31], whole[:, :31], rtol=1e-7, atol=0)
    assert whole[5, 31:].tolist() == list(range(30)), "equal ones in order of id"
    assert described([-1.0, -1.0, -2.0, 7.0, 9.0], 7, 1) == TokenLogprob(7, -1.0, ((7, -1.0),))


def _serve(tp: TensorParallel, folder: str, gather: bool) -> list[GenerationResult]:
    model = MambaForCausalLM.from_pretrained(folder, tp)
    with Engine(model, max_batch_size=2, max_prefill_tokens=7, gather_logits=gather) as engine:
        for length in (1, 5, 19):
            engine.add_request(
                list(range(length)), SamplingParams(max_new_tokens=3, logprobs=3, prompt_logprobs=2)
            )
        return [event for events in drain(engine).values() for event in events]


def test_a_model_over_ranks(ranks, tmp_path: Path) -> None:
    save_case("mamba", tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    (expected,) = ranks(1).run(_serve, str(tmp_path), True)
    logits = model(torch.arange(19)[None])[0]
    (long,) = [e.prompt_logprobs for e in expected if e.prompt_logprobs and len(e.prompt_logprobs) == 19]
    for i in range(1, 19):
        exact = logits[i - 1].double().log_softmax(-1)
        assert long[i].logprob == pytest.approx(exact[i].item(), abs=1e-5)
    for size, gather in ((2, True), (2, False), (3, False)):
        first, *others = ranks(size).run(_serve, str(tmp_path), gather)
        assert all(other == first for other in others), "the same on every rank"
        for event, wanted in zip(first, expected, strict=True):
            assert (event.index, event.token_id) == (wanted.index, wanted.token_id)
            assert _close(event.logprob, wanted.logprob)
            for found, also in zip(event.prompt_logprobs or (), wanted.prompt_logprobs or (), strict=True):
                assert _close(found, also)


def test_beside_steps_that_are_padded_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Repeated:
        """Stands for a captured step: runs it anew."""

        made = 0

        def __init__(self, device: torch.device) -> None: ...

        def __call__(self, run: Callable[[], object]) -> Callable[[], object]:
            Repeated.made += 1
            return run

    monkeypatch.setattr("tp_mamba.engine.steps.CudaCapture", Repeated)
    save_case("mamba", tmp_path)
    model, found = MambaForCausalLM.from_pretrained(tmp_path), []
    params = SamplingParams(max_new_tokens=12, logprobs=2, n=2, frequency_penalty=0.4, min_tokens=3)
    scored = SamplingParams(max_new_tokens=3, logprobs=1, prompt_logprobs=1)
    for capturing in (False, True):
        with Engine(model, max_batch_size=4, max_prefill_tokens=16, overlap=True, check_steps=True) as engine:
            engine._capturing = capturing
            engine.add_request(list(range(40)), params)
            events = [event for _ in range(6) for event in engine.step()]
            engine.add_request(list(range(20, 45)), scored)
            found.append(sorted([*events, *chain(*drain(engine).values())], key=lambda event: event.index))
    assert Repeated.made > 1
    for event, wanted in zip(*found, strict=True):
        assert (event.index, event.token_id) == (wanted.index, wanted.token_id)
        assert _close(event.logprob, wanted.logprob)
        for one, other in zip(event.prompt_logprobs or (), wanted.prompt_logprobs or (), strict=True):
            assert _close(one, other)
    assert sum(event.prompt_logprobs is not None for event in found[1]) == 1


def _close(found: TokenLogprob | None, wanted: TokenLogprob | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    assert [id_ for id_, _ in found.top] == [id_ for id_, _ in wanted.top]
    pairs = zip(found.top, wanted.top, strict=True)
    return abs(found.logprob - wanted.logprob) < 1e-4 and all(abs(a[1] - b[1]) < 1e-4 for a, b in pairs)


def test_wrong_parameters_and_models_that_cannot() -> None:
    for wrong, sentence in (
        ({"logprobs": 21}, "logprobs=21 is out of range: list 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1 is out of range"),
        ({"logprobs": True}, "logprobs is True, which is not an integer"),
        ({"prompt_logprobs_start": -1}, "prompt_logprobs_start=-1 is negative"),
    ):
        with pytest.raises(ValueError, match=sentence):
            SamplingParams(**wrong)

    class Plain:
        def __init__(self) -> None:
            toy = ToyModel()
            self.config, self.tp, self.device = toy.config, toy.tp, toy.device

    engine = Engine(Plain())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt_logprobs was given, and a Plain cannot score prompts"):
        engine.add_request([1], SamplingParams(prompt_logprobs=0))
