"""The model's own checks, and its agreement with the definition in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_factory import falcon_mamba, full_forward, mamba, save_case

from tp_mamba import MambaConfig, MambaForCausalLM, TensorParallel
from tp_mamba.batch import MambaMetadataBuilder


@pytest.fixture
def model() -> MambaForCausalLM:
    config = MambaConfig.from_dict(mamba().config.to_dict())
    torch.manual_seed(0)
    return MambaForCausalLM(config, dtype=torch.float32)


def test_forward_refuses(model: MambaForCausalLM) -> None:
    with pytest.raises(
        ValueError, match=r"got input_ids of shape \[1, 0\], expected \[B, L\] with at least one token"
    ):
        model(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got input_ids of shape \[3\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"got input_ids in torch.float32: token ids are a tensor of int64 or int32"
    ):
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="got input_ids in list: token ids are a tensor"):
        model([[1, 2]])
    with pytest.raises(ValueError, match="token ids between 5 and 97, the vocabulary has ids 0 to 96"):
        model(torch.tensor([[5, 97]]))
    with pytest.raises(ValueError, match="token ids between -1 and 5"):
        model(torch.tensor([[5, -1]]))
    metadata = MambaMetadataBuilder("cpu").build(decode_slots=[0])
    with pytest.raises(ValueError, match=r"input_ids of shape \[2\], the metadata describes \[1\]"):
        model.forward_packed(torch.zeros(2, dtype=torch.int64), metadata, model.new_cache(1))
    other = MambaForCausalLM(
        MambaConfig.from_dict(mamba(num_hidden_layers=3).config.to_dict()), dtype=torch.float32
    )
    with pytest.raises(ValueError, match="got a cache of 3 layers for a model of 2"):
        model.forward_packed(torch.zeros(1, dtype=torch.int64), metadata, other.new_cache(1))


def test_wrong_arguments_are_named(model: MambaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.int8 is not supported"):
        MambaForCausalLM(model.config, dtype=torch.int8)
    with pytest.raises(ValueError, match="got tp=2: pass a TensorParallel"):
        MambaForCausalLM(model.config, 2)
    with pytest.raises(ValueError, match="got 'gloo' for a process group"):
        TensorParallel("gloo")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' but torch finds no GPU"):
            MambaForCausalLM(model.config, device="cuda")


def test_a_whole_jamba_and_too_many_ranks_are_refused() -> None:
    jamba = MambaConfig.from_dict(
        {
            "model_type": "jamba",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "vocab_size": 32,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
        }
    )
    with pytest.raises(ValueError, match="a whole jamba model cannot be built here"):
        MambaForCausalLM(jamba)
    config = MambaConfig.from_dict(falcon_mamba().config.to_dict())
    with pytest.raises(
        ValueError,
        match=r"a model of 37 channels and .* is too small for 38 tensor-parallel ranks: use at most 37 ranks",
    ):
        MambaForCausalLM(config, TensorParallel.virtual(0, 38), device="meta")


def test_the_dtype_is_the_checkpoints_unless_it_is_given(tmp_path: Path) -> None:
    mamba().bfloat16().save_pretrained(tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A.dtype == torch.float32
    assert MambaForCausalLM.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
    assert model.checkpoint_folder == tmp_path


def test_float32_is_as_close_to_float64_as_float32_allows(tmp_path: Path) -> None:
    """The same weights in float64: an oracle that transformers, which casts inside, cannot give."""
    save_case("falcon-mamba", tmp_path)
    ids = torch.arange(30)[None]
    wide = MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(ids)
    assert wide.dtype == torch.float64
    narrow = MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids)
    assert (narrow - wide).abs().max() <= 1e-5 * wide.abs().max()


def test_a_new_model_is_the_same_at_every_rank_count(model: MambaForCausalLM) -> None:
    from tp_mamba.parallel.sharding import sharded_tensors

    parts = []
    for rank in range(3):
        torch.manual_seed(0)
        parts.append(
            list(
                sharded_tensors(
                    MambaForCausalLM(model.config, TensorParallel.virtual(rank, 3), torch.float32)
                )
            )
        )
    for tensor, *shares in zip(sharded_tensors(model), *parts, strict=True):
        merged = tensor.shard.merge([share.read() for share in shares])
        assert torch.equal(merged, tensor.read()), tensor.name


def test_one_parameter_of_a_frozen_model_may_take_a_gradient(model: MambaForCausalLM) -> None:
    assert not any(p.requires_grad for p in model.parameters())
    table = model.backbone.embeddings.weight.requires_grad_()
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    assert table.grad is not None
    assert table.grad[0].any()
    assert all(p.grad is None for p in model.parameters() if p is not table)


def test_initial_values_of_a_whole_model() -> None:
    """mamba_ssm's ``_init_weights``: out_proj divided by sqrt(layers), projection biases zero."""
    config = MambaConfig.from_dict(
        mamba(num_hidden_layers=16, hidden_size=32, use_bias=True).config.to_dict()
    )
    torch.manual_seed(0)
    model = MambaForCausalLM(config, dtype=torch.float32)
    bound = config.intermediate_size**-0.5 / 4
    for mixer in model.mixers():
        assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound
        assert not mixer.in_proj.bias.any()
        assert not mixer.out_proj.bias.any()
    assert 0.015 < model.backbone.embeddings.weight.std() < 0.025


def test_the_epsilon_of_the_block_norms_is_the_configs(tmp_path: Path) -> None:
    """At its usual 1e-5 a wrong epsilon hides behind activations of size one; at 0.5 it cannot."""
    oracle = mamba(layer_norm_epsilon=0.5)
    oracle.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    expected = full_forward(oracle, ids)
    logits = MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_residual_is_kept_in_float32_if_the_config_says_so(tmp_path: Path) -> None:
    """Forty bf16 layers of small outputs: a sum in bf16 rounds away more of them than the layers err themselves."""
    errors = {}
    for wide in (True, False):
        oracle = mamba(residual_in_fp32=wide, num_hidden_layers=40).bfloat16()
        with torch.no_grad():
            for layer in oracle.backbone.layers:
                layer.mixer.out_proj.weight /= 64
        oracle.save_pretrained(tmp_path / str(wide))
        ids = torch.arange(20)[None]
        exact = MambaForCausalLM.from_pretrained(tmp_path / str(wide), dtype=torch.float64)(ids)
        model = MambaForCausalLM.from_pretrained(tmp_path / str(wide), dtype=torch.bfloat16)
        errors[wide] = float((model(ids) - exact).norm() / exact.norm())
    assert errors[True] < 0.5 * errors[False], errors
