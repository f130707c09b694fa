"""Sampled text and stop conditions at several rank counts: the same tokens on every rank and at every n."""

from __future__ import annotations

from pathlib import Path

from model_factory import save_case

from tp_mamba.engine.params import SamplingParams
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

PROMPTS = [[5, 17, 33, 2, 80, 41, 9], [60], [12, 13, 14]]
SETTINGS = [
    SamplingParams(max_new_tokens=24, temperature=0.8, seed=5, ignore_eos=True),
    SamplingParams(
        max_new_tokens=24, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=6, ignore_eos=True
    ),
    SamplingParams(
        max_new_tokens=24, temperature=0.7, repetition_penalty=1.4, stop_token_ids=(3, 40), seed=7
    ),
]


def _sample(tp: TensorParallel, folder: Path) -> list[list[tuple[list[int], str]]]:
    model = MambaForCausalLM.from_pretrained(folder, tp)
    return [
        [(list(r.token_ids), r.finish_reason) for r in model.generate(PROMPTS, params, max_batch_size=2)]
        for params in SETTINGS
    ]


def test_sampled_text_is_the_same_at_every_rank_count(ranks, tmp_path: Path) -> None:
    save_case("falcon-mamba", tmp_path)
    one = ranks(1).run(_sample, tmp_path)[0]
    assert len({tuple(ids) for setting in one for ids, _ in setting}) == 9, "the draws should differ"
    for n in (2, 3, 4):
        assert ranks(n).run(_sample, tmp_path) == [one] * n
