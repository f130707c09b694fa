"""Checkpoints read and written by several ranks together; and one rank that cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from model_factory import CASES, full_forward, save_case
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel


def _load_and_save(tp: TensorParallel, folder: Path, target: Path) -> None:
    MambaForCausalLM.from_pretrained(folder, tp).save_pretrained(target)


def _same_files(a: Path, b: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "mamba-biased-untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_by_n_ranks_is_what_was_loaded(
    ranks, tmp_path: Path, name: str, n: int, dtype: torch.dtype
) -> None:
    model = CASES[name]().to(dtype)
    model.save_pretrained(tmp_path / "original")
    ranks(n).run(_load_and_save, tmp_path / "original", tmp_path / "saved")
    _same_files(tmp_path / "original", tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    ids = torch.arange(12)[None]
    assert torch.equal(full_forward(again.eval(), ids), full_forward(model.eval(), ids))


def _logits(tp: TensorParallel, folder: Path) -> torch.Tensor:
    return MambaForCausalLM.from_pretrained(folder, tp, dtype=torch.float32)(torch.arange(12)[None])


@pytest.mark.parametrize("n", [3, 4])
def test_shards_made_for_four_load_at_three_and_four(ranks, tmp_path: Path, n: int) -> None:
    oracle = save_case("falcon-mamba", tmp_path / "full")
    shard_checkpoint(tmp_path / "full", tmp_path / "shards", 4)
    expected = full_forward(oracle, torch.arange(12)[None])
    for logits in ranks(n).run(_logits, tmp_path / "shards"):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    _same_files(tmp_path / "full", tmp_path / "merged")


def _load_where_rank_1_has_a_damaged_copy(tp: TensorParallel, good: Path, damaged: Path) -> str:
    try:
        MambaForCausalLM.from_pretrained(damaged if tp.rank == 1 else good, tp)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.parametrize("damage", ["no config", "truncated weights"])
def test_one_rank_that_cannot_load_stops_them_all(ranks, tmp_path: Path, damage: str) -> None:
    save_case("mamba", tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "damaged")
    if damage == "no config":
        (tmp_path / "damaged" / "config.json").unlink()
    else:
        weights = tmp_path / "damaged" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    told = ranks(3).run(_load_where_rank_1_has_a_damaged_copy, tmp_path / "good", tmp_path / "damaged")
    assert "damaged" in told[1]
    assert "RankFailedError" not in told[1]
    assert all(
        t.startswith("RankFailedError: rank 1 of 3 failed: ") and "damaged" in t for t in (told[0], told[2])
    )


def _save_where_rank_0_cannot_write(tp: TensorParallel, folder: Path, target: Path) -> str:
    model = MambaForCausalLM.from_pretrained(folder, tp)
    try:
        model.save_pretrained(target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_rank_0_failing_to_save_is_told_to_all_and_the_old_checkpoint_survives(ranks, tmp_path: Path) -> None:
    save_case("mamba", tmp_path / "original")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("not a checkpoint")
    told = ranks(2).run(_save_where_rank_0_cannot_write, tmp_path / "original", tmp_path / "precious")
    assert "precious" in told[0]
    assert told[1].startswith("RankFailedError: rank 0 of 2 failed: ")
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["notes.txt"]
