"""Two NCCL ranks on two GPUs: the model, its state and its text against transformers on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import full_forward, greedy, save_case
from rank_pool import RankPool
from torch.distributed.tensor.debug import CommDebugMode

from tp_mamba.engine.params import SamplingParams
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.collectives import gather_from_tp, reduce_from_tp
from tp_mamba.parallel.group import TensorParallel

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

PROMPTS = [[5, 17, 33, 2, 80, 41, 9], [60], [12, 13, 14]]


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()


def _collectives(tp: TensorParallel) -> tuple[Any, ...]:
    x = torch.full((3, 5), tp.rank + 1.0, device=tp.device, requires_grad=True)
    total, joined = reduce_from_tp(x, tp), gather_from_tp(x, tp)
    (total.sum() + joined.sum()).backward()
    return str(tp.device), tp.backend, total.detach().cpu(), joined.detach().cpu(), x.grad.cpu()


def test_collectives(gpus: RankPool) -> None:
    for rank, (device, backend, total, joined, gradient) in enumerate(gpus.run(_collectives)):
        assert (device, backend) == (f"cuda:{rank}", "nccl")
        assert torch.equal(total, torch.full((3, 5), 3.0))
        assert torch.equal(joined, torch.cat([torch.full((3, 5), r + 1.0) for r in range(2)], dim=-1))
        assert torch.equal(gradient, torch.full((3, 5), 2.0))


def _run_model(tp: TensorParallel, folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=dtype)
    assert model.device == tp.device
    model(ids)  # the first sum of a group has its ranks share memory
    with CommDebugMode() as mode:
        logits = model(ids)
    greedy_text = model.generate(PROMPTS, SamplingParams(max_new_tokens=8, ignore_eos=True))
    sampled = model.generate(
        PROMPTS, SamplingParams(max_new_tokens=12, temperature=0.9, seed=4, ignore_eos=True)
    )
    return {
        "logits": logits.cpu(),
        "greedy": [list(r.token_ids) for r in greedy_text],
        "sampled": [list(r.token_ids) for r in sampled],
        "counts": {str(op): count for op, count in mode.get_comm_counts().items()},
    }


@pytest.mark.parametrize("name", ["mamba", "mamba-biased-untied", "falcon-mamba"])
def test_model_on_two_gpus(gpus: RankPool, name: str, tmp_path: Path) -> None:
    oracle = save_case(name, tmp_path)
    ids = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(5))
    expected = full_forward(oracle, ids)
    single = _run_model(TensorParallel(), tmp_path, ids, torch.float32)
    results = gpus.run(_run_model, tmp_path, ids, torch.float32)
    for result in [single, *results]:
        assert (result["logits"] - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert result["greedy"] == [greedy(oracle, prompt, 8) for prompt in PROMPTS]
        assert result["sampled"] == single["sampled"]
    assert torch.equal(results[0]["logits"], results[1]["logits"])
    assert results[0]["counts"] == {"c10d._allgather_base_": 1}, "the sums are not NCCL's"


def test_bfloat16_on_two_gpus(gpus: RankPool, tmp_path: Path) -> None:
    """In bf16 two ranks may differ from one by the rounding of partial sums, no more than one does from float32."""
    oracle = save_case("falcon-mamba", tmp_path)
    ids = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(5))
    exact = full_forward(oracle.bfloat16().float(), ids)
    one = _run_model(TensorParallel(), tmp_path, ids, torch.bfloat16)["logits"]
    two = gpus.run(_run_model, tmp_path, ids, torch.bfloat16)[0]["logits"]
    assert (two - exact).norm() <= 2 * (one - exact).norm()


def _save_and_load_state(tp: TensorParallel, folder: Path, path: Path, save: bool) -> torch.Tensor:
    from tp_mamba.batch import MambaMetadataBuilder

    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)
    cache, builder = model.new_cache(1), MambaMetadataBuilder(model.device)
    slot = cache.allocate()
    if save:
        metadata = builder.build(prefill_slots=[slot], prefill_lengths=[9], has_initial_states=[False])
        model.forward_packed(torch.arange(9, device=model.device), metadata, cache)
        cache.save(path, slot)
    else:
        cache.load(path, slot)
    ids = torch.tensor([9], device=model.device)
    return model.forward_packed(ids, builder.build(decode_slots=[slot]), cache).cpu()


def test_a_state_moves_from_two_gpus_to_one(gpus: RankPool, tmp_path: Path) -> None:
    oracle = save_case("falcon-mamba", tmp_path / "model")
    expected = full_forward(oracle, torch.arange(10)[None])[0, -1:]
    two = gpus.run(_save_and_load_state, tmp_path / "model", tmp_path / "state", True)[0]
    one = _save_and_load_state(TensorParallel(), tmp_path / "model", tmp_path / "state", False)
    for logits in (two, one):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
