"""Models in training hold A_log: from checkpoints and back to them, and to models that serve."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from checkpoint_samples import odd_config, random_tensors, write_checkpoint
from safetensors.torch import load_file

from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors

A_LOG = "backbone.layers.1.mixer.A_log"
IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = odd_config()
    return write_checkpoint(tmp_path / "model", config, random_tensors(config))


def test_it_computes_what_the_model_that_serves_does(folder: Path) -> None:
    trained, serving = (MambaForCausalLM.from_pretrained(folder, trainable=flag) for flag in (True, False))
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())
    names = {name.replace("A_log", "A") for name, _ in trained.named_parameters()}
    assert names == {name for name, _ in serving.named_parameters()}
    assert torch.equal(trained.get_parameter(A_LOG), load_file(folder / "model.safetensors")[A_LOG])
    assert trained.get_parameter(A_LOG).is_contiguous(), "FSDP2 takes no other"
    assert torch.equal(trained(IDS), serving(IDS))
    prompts = [[5, 7, 11]]
    assert trained.generate(prompts)[0].token_ids == serving.generate(prompts)[0].token_ids


def _load_and_save(tp: TensorParallel, folder: Path, saved: Path) -> None:
    MambaForCausalLM.from_pretrained(folder, tp, trainable=True).save_pretrained(saved)


@pytest.mark.parametrize("n", [1, 3])
def test_loading_and_saving_changes_no_bit(ranks, folder: Path, tmp_path: Path, n: int) -> None:
    ranks(n).run(_load_and_save, folder, tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_was_trained_is_saved_in_float32(tmp_path: Path) -> None:
    """A step that bfloat16 would round away, in a checkpoint that was bfloat16 throughout."""
    config = odd_config(dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    model = MambaForCausalLM.from_pretrained(folder, dtype=torch.float32, trainable=True)
    with torch.no_grad():
        model.get_parameter(A_LOG).add_(1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = MambaForCausalLM.from_pretrained(tmp_path / "saved", trainable=True)
    assert torch.equal(again.get_parameter(A_LOG), model.get_parameter(A_LOG))


def test_between_the_two_forms_in_memory(folder: Path) -> None:
    """Both show their tensors as a file has them, so one takes them from the other."""
    trained = MambaForCausalLM.from_pretrained(folder, trainable=True)
    with torch.no_grad():
        for param in trained.parameters():
            param.mul_(1.25)
    serving = MambaForCausalLM(trained.config)
    for theirs, ours in zip(sharded_tensors(trained), sharded_tensors(serving), strict=True):
        assert theirs.name == ours.name
        ours.load(theirs.read())
    assert torch.equal(serving(IDS), trained(IDS))
    back = MambaForCausalLM(trained.config, trainable=True)
    for theirs, ours in zip(sharded_tensors(serving), sharded_tensors(back), strict=True):
        ours.load(theirs.read())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), trained.parameters(), strict=True))


def test_copies_state_dicts_and_loaders(folder: Path) -> None:
    model = MambaForCausalLM.from_pretrained(folder, trainable=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), model(IDS))
    fresh = MambaForCausalLM(model.config, trainable=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), model(IDS))
    A_log = fresh.get_parameter(A_LOG)
    A_log.weight_loader(A_log, torch.ones(30, 5))
    assert (fresh.get_parameter(A_LOG) == 1).all()
    half = model.bfloat16()
    assert half.get_parameter(A_LOG).dtype == torch.float32
    assert half(IDS).dtype == torch.float32
