"""State saved at one rank count and continued at another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_factory import full_forward, save_case

from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import RankFailedError, TensorParallel


def _prefill_and_save(tp: TensorParallel, folder: Path, path: Path) -> None:
    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)
    cache = model.new_cache(2)
    cache.allocate()
    slot = cache.allocate()
    metadata = MambaMetadataBuilder("cpu").build(
        prefill_slots=[slot], prefill_lengths=[9], has_initial_states=[False]
    )
    model.forward_packed(torch.arange(9), metadata, cache)
    cache.save(path, slot)


def _load_and_step(tp: TensorParallel, folder: Path, path: Path) -> torch.Tensor:
    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)
    cache = model.new_cache(1)
    slot = cache.allocate()
    cache.load(path, slot)
    return model.forward_packed(
        torch.tensor([9]), MambaMetadataBuilder("cpu").build(decode_slots=[slot]), cache
    )


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(4, 3), (1, 4), (2, 1)])
def test_a_state_moves_between_rank_counts(ranks, tmp_path: Path, saved_at: int, loaded_at: int) -> None:
    oracle = save_case("falcon-mamba", tmp_path / "model")
    expected = full_forward(oracle, torch.arange(10)[None])[0, -1:]
    ranks(saved_at).run(_prefill_and_save, tmp_path / "model", tmp_path / "state")
    for logits in ranks(loaded_at).run(_load_and_step, tmp_path / "model", tmp_path / "state"):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def _load_where_one_rank_sees_no_file(tp: TensorParallel, folder: Path, path: Path) -> str:
    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)
    cache = model.new_cache(1)
    slot = cache.allocate()
    cache.ssm_states.fill_(7)
    try:
        cache.load(path if tp.rank != 1 else path.with_name("elsewhere"), slot)
    except (ValueError, RankFailedError) as error:
        assert (cache.ssm_states == 7).all(), "a failed load must change nothing on any rank"
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_one_rank_failing_to_load_stops_them_all(ranks, tmp_path: Path) -> None:
    save_case("falcon-mamba", tmp_path / "model")
    ranks(1).run(_prefill_and_save, tmp_path / "model", tmp_path / "state")
    told = ranks(3).run(_load_where_one_rank_sees_no_file, tmp_path / "model", tmp_path / "state")
    assert told[1].startswith("ValueError: the state file")
    assert all(
        "RankFailedError: rank 1 of 3 failed: ValueError: the state file" in t for t in (told[0], told[2])
    )


def _save_to_a_folder(tp: TensorParallel, folder: Path) -> str:
    model = MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)
    cache = model.new_cache(1)
    try:
        cache.save(folder, cache.allocate())
    except (ValueError, RankFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_one_rank_failing_to_save_stops_them_all(ranks, tmp_path: Path) -> None:
    save_case("falcon-mamba", tmp_path)
    told = ranks(2).run(_save_to_a_folder, tmp_path)
    assert told[0].startswith("ValueError: the state cannot be saved as")
    assert told[1].startswith("RankFailedError: rank 0 of 2 failed: ValueError: the state cannot be saved as")
