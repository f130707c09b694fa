"""Logits cut over the ranks against whole rows: the same token, whatever the parameters, ties and odd values."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_factory import save_case

from tp_mamba.engine.choice import NOT_FINITE, choose
from tp_mamba.engine.cut_vocabulary import CutVocabulary, choose_over_ranks
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.sampler import Sampler
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 90},
    {"top_k": 10_000},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"top_p": 1 - 1e-12},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 1e-6, "top_p": 0.9},
    {"temperature": 30.0, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.4},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"presence_penalty": -0.4, "repetition_penalty": 1.2, "top_k": 9},
    {"frequency_penalty": 1.9, "logit_bias": {1: 3.5, 4: -100.0}},
    {"temperature": 0.0, "logit_bias": {0: 2.0, 2: -1.0}, "min_tokens": 2, "stop_token_ids": (1, 3)},
]
ROWS = 24


def rows_of(vocab_size: int, seed: int) -> torch.Tensor:
    """Logits of many kinds: spread, with ties everywhere, all equal, -inf in places, and not finite at all."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(ROWS, vocab_size, generator=generator)
    logits[4:10] = logits[4:10].round()  # many equal ones, whose order of ids decides
    logits[10:12] = 0.5
    logits[12, ::2] = -torch.inf
    logits[13, vocab_size // 2] = torch.nan
    logits[14, -1] = torch.inf
    logits[15] = -torch.inf
    logits[16] *= 20
    return logits


def _columns(x: torch.Tensor, cut: CutVocabulary, fill: float) -> torch.Tensor:
    """This rank's columns of ``x``, with padding that would win if it were looked at."""
    padded = torch.full((len(x), cut.tp.size * cut.width), fill, dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    return padded[:, cut.start : cut.start + cut.width].clone()


def _choose(tp: TensorParallel, vocab_sizes: list[int]) -> list[str]:
    """What differs from the whole rows, on this rank."""
    wrong = []
    for (vocab_size, hidden), filters in product([(v, h) for v in vocab_sizes for h in (0, 3)], FILTERS):
        usable = max(1, vocab_size - hidden)
        logits, cut = rows_of(vocab_size, vocab_size), CutVocabulary.of(tp, vocab_size, usable)
        generator = torch.Generator().manual_seed(7)
        params = SamplingParams(**{"temperature": 0.9, **filters})
        uniforms = torch.rand(ROWS, dtype=torch.float64, generator=generator)
        uniforms[:3] = torch.tensor([0.0, 1 - 2.0**-53, 0.5])
        seen = torch.rand(ROWS, vocab_size, generator=generator) < 0.2
        if params.repetition_penalty == 1:
            seen = None
        made = torch.randint(4, (ROWS, vocab_size), generator=generator, dtype=torch.int32)
        bias = torch.zeros(ROWS, vocab_size)
        for token, value in params.logit_bias:
            bias[:, token] = value
        if not params.temperature:
            uniforms = None
        expected = choose(
            logits[:, :usable],
            params,
            seen=None if seen is None else seen[:, :usable],
            made=made[:, :usable],
            bias=bias[:, :usable],
            uniforms=uniforms,
        )
        found = choose_over_ranks(
            _columns(logits, cut, 1e9),
            params,
            cut,
            seen=None if seen is None else _columns(seen, cut, 0),
            made=_columns(made, cut, 0),
            bias=_columns(bias, cut, 0),
            uniforms=uniforms,
        )
        if not torch.equal(found, expected):
            wrong.append(f"{vocab_size} {usable} {filters}: {found.tolist()} instead of {expected.tolist()}")
    return wrong


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_token_of_the_whole_row(ranks, size: int) -> None:
    assert ranks(size).run(_choose, [5, 97]) == [[]] * size


def _sample(tp: TensorParallel, cut_up: bool) -> list[list[int]]:
    """Six steps of requests with parameters of their own, some with a penalty."""
    vocab_size, usable, steps = 50, 47, []
    cut = CutVocabulary.of(tp, vocab_size, usable)
    sampler = Sampler(len(FILTERS), vocab_size, usable, torch.device("cpu"), cut=cut if cut_up else None)
    requests = []
    for slot, filters in enumerate(FILTERS):
        params = SamplingParams(**{"temperature": 0.9, "seed": slot, **filters})
        requests.append(Request(slot, [slot, 46], params, slot=slot))
        sampler.begin(requests[-1])
    for step in range(6):
        logits = rows_of(vocab_size, step)[: len(FILTERS)]
        steps.append(sampler.sample(_columns(logits, cut, 1e9) if cut_up else logits, requests).tolist())
    return steps


def test_requests_of_all_kinds_beside_each_other(ranks) -> None:
    expected = _sample(TensorParallel(device="cpu"), False)
    assert ranks(2).run(_sample, True) == [expected] * 2
    assert ranks(3).run(_sample, True) == [expected] * 3
    assert any(NOT_FINITE in step for step in expected)
    assert len({tuple(step) for step in expected}) == 6


def test_only_small_things_travel() -> None:
    sent: list[int] = []

    def all_gather(x: torch.Tensor, dim: int) -> torch.Tensor:
        sent.append(x.nbytes)
        return torch.cat([x, x])

    tp = SimpleNamespace(rank=0, size=2, all_gather=all_gather)
    cut = CutVocabulary(tp, 32_512, 65_024, 65_024)  # type: ignore[arg-type]
    logits, uniforms = torch.randn(2, cut.width), torch.rand(2, dtype=torch.float64)
    choose_over_ranks(logits, SamplingParams(), cut)
    assert sent == [2 * 2 * 8]
    sent.clear()
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
    choose_over_ranks(logits, params, cut, uniforms=uniforms)
    assert len(sent) == 11
    assert sum(sent) < 2 * 25_000  # a row of logits has 260,096 bytes


def _serve(tp: TensorParallel, folder: str, gather_logits: bool) -> list[int]:
    model = MambaForCausalLM.from_pretrained(folder, tp)
    with Engine(model, max_batch_size=5, gather_logits=gather_logits) as engine:
        for seed, filters in enumerate(FILTERS):
            params = SamplingParams(**{"temperature": 0.9, "seed": seed, "max_new_tokens": 5, **filters})
            engine.add_request([5 + seed, 17], params)
        tokens = []
        while engine.has_work:
            tokens += [event.token_id for event in engine.step()]
    return tokens


def test_an_engine_gives_the_same_tokens_without_gathering(ranks, tmp_path: Path) -> None:
    save_case("mamba", tmp_path)
    whole, _ = ranks(2).run(_serve, str(tmp_path), True)
    assert ranks(2).run(_serve, str(tmp_path), False) == [whole] * 2
    assert len(set(whole)) > 10
