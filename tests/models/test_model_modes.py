"""The whole model moved, cast, built without memory, and compiled."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_factory import CASES, mamba

from tp_mamba import MambaConfig, MambaForCausalLM, TensorParallel
from tp_mamba.checkpoint.load import load_rank
from tp_mamba.parallel.sharding import sharded_tensors

IDS = torch.arange(20)[None]


@pytest.fixture(params=["mamba", "falcon-mamba"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tied and an untied model, saved by transformers."""
    CASES[request.param]().save_pretrained(tmp_path)
    return tmp_path


def test_dtype_and_device_are_those_of_the_parameters(checkpoint: Path) -> None:
    model = MambaForCausalLM.from_pretrained(checkpoint)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    model.to("meta")
    assert model.device == torch.device("meta")
    model = MambaForCausalLM.from_pretrained(checkpoint).bfloat16()
    assert model.dtype == torch.bfloat16


def test_a_cast_model_is_saved_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    MambaForCausalLM.from_pretrained(checkpoint).bfloat16().save_pretrained(tmp_path / "narrow")
    assert MambaConfig.from_pretrained(tmp_path / "narrow").dtype == torch.bfloat16
    assert MambaForCausalLM.from_pretrained(tmp_path / "narrow").dtype == torch.bfloat16


@pytest.mark.parametrize("n", [1, 2])
def test_meta_and_then_memory(n: int, checkpoint: Path) -> None:
    """As a program that builds without memory does it: shapes first, then memory, then weights."""
    config = MambaConfig.from_pretrained(checkpoint)
    for rank in range(n):
        tp = TensorParallel.virtual(rank, n)
        with torch.device("meta"):
            model = MambaForCausalLM(config, tp)
        assert {param.device.type for param in model.parameters()} == {"meta"}
        assert model.device.type == "meta"
        model.to_empty(device="cpu")
        assert (model.lm_head.weight is model.backbone.embeddings.weight) == config.tie_word_embeddings
        load_rank(model, checkpoint)
        usual = MambaForCausalLM(config, tp)
        load_rank(usual, checkpoint)
        for ours, theirs in zip(sharded_tensors(model), sharded_tensors(usual), strict=True):
            assert torch.equal(ours.read(), theirs.read())
            assert ours.param.stride() == theirs.param.stride(), ours.name  # as the kernels read it
        if n == 1:
            assert torch.equal(model(IDS), usual(IDS))


def test_a_model_inside_a_meta_context_on_a_device_of_its_own(checkpoint: Path) -> None:
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig.from_pretrained(checkpoint), device="cpu")
    assert model.device.type == "cpu"
    assert all(torch.isfinite(param).all() for param in model.parameters())


def test_a_copy_is_a_model_of_its_own(checkpoint: Path) -> None:
    model = MambaForCausalLM.from_pretrained(checkpoint)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    with torch.no_grad():
        model.backbone.norm_f.weight.zero_()
    assert twin.backbone.norm_f.weight.any()
    tied = twin.config.tie_word_embeddings
    assert (twin.lm_head.weight is twin.backbone.embeddings.weight) == tied


def test_compiled_in_one_graph(checkpoint: Path) -> None:
    """That ids are of the vocabulary is then the caller's to see to: looking at values would end the graph."""
    model = MambaForCausalLM.from_pretrained(checkpoint)
    expected = model(IDS)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS), expected)


def test_compiled(tmp_path: Path) -> None:
    mamba(num_hidden_layers=1).save_pretrained(tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    expected = model(IDS)
    torch.compiler.reset()
    logits = torch.compile(model)(IDS)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
