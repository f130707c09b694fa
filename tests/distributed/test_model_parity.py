"""The whole model at 1, 2, 3 and 4 ranks against one full forward of transformers, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import CASES, full_forward, greedy, save_case
from torch.distributed.tensor.debug import CommDebugMode

from tp_mamba.engine.params import SamplingParams
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

PROMPTS = [[5, 17, 33, 2, 80, 41, 9], [60], [12, 13, 14]]


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A saved checkpoint, transformers' logits of a batch, and its greedy text."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_case(request.param, folder)
    ids = torch.randint(model.config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(5))
    return {
        "folder": folder,
        "ids": ids,
        "logits": full_forward(model, ids),
        "greedy": [greedy(model, prompt, 8) for prompt in PROMPTS],
    }


def _logits_and_text(
    tp: TensorParallel, folder: Path, ids: torch.Tensor
) -> tuple[torch.Tensor, list[list[int]]]:
    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)
    results = model.generate(PROMPTS, SamplingParams(max_new_tokens=8, ignore_eos=True))
    return model(ids), [list(r.token_ids) for r in results]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_logits_and_greedy_text(ranks, case: dict[str, Any], n: int) -> None:
    results = ranks(n).run(_logits_and_text, case["folder"], case["ids"])
    largest = case["logits"].abs().max()
    for logits, text in results:
        assert logits.dtype == torch.float32
        assert (logits - case["logits"]).abs().max() <= 1e-4 * largest
        assert torch.equal(logits, results[0][0]), "the ranks disagree on a bit of the logits"
        assert text == case["greedy"]


def _count_collectives(tp: TensorParallel, folder: Path) -> dict[str, int]:
    """Collectives of one forward of the model on a mixed batch: a decode row, a new prompt, a continued one."""
    from tp_mamba.batch import MambaMetadataBuilder

    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)
    cache = model.new_cache(3)
    a, b, c = (cache.allocate() for _ in range(3))
    metadata = MambaMetadataBuilder(model.device).build(
        decode_slots=[a], prefill_slots=[b, c], prefill_lengths=[3, 2], has_initial_states=[False, True]
    )
    with CommDebugMode() as mode:
        model.forward_packed(torch.arange(6), metadata, cache)
    return {str(op): count for op, count in mode.get_comm_counts().items()}


def test_two_collectives_a_layer(ranks, tmp_path: Path) -> None:
    layers = save_case("falcon-mamba", tmp_path).config.num_hidden_layers
    for counts in ranks(2).run(_count_collectives, tmp_path):
        # two all-reduces per layer, one for the embedding; one gather of the logits
        assert counts == {"c10d.allreduce_": 2 * layers + 1, "c10d._allgather_base_": 1}, counts


def test_one_rank_communicates_nothing(tmp_path: Path) -> None:
    save_case("falcon-mamba", tmp_path)
    assert _count_collectives(TensorParallel(device="cpu"), tmp_path) == {}
