"""Both ways with transformers: what it writes is loaded here, what is written here it loads."""

import pytest
import torch
import transformers
from checkpoint_samples import assert_same_bits, load_ranks, merged, odd_config, random_tensors, write_raw

from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.model import MambaForCausalLM

FAMILIES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "mamba-untied-biased": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
}
OPTIONS = {
    "mamba": {},
    "mamba-untied-biased": {
        "tie_word_embeddings": False,
        "use_bias": True,
        "conv_kernel": 2,
        "state_size": 24,
    },
    "falcon": {
        "tie_word_embeddings": False,
        "intermediate_size": 50,
        "expand": 16,
    },  # as the published file has it
}


def theirs(family, dtype):
    """A model of transformers with the spread of trained weights in every tensor."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "time_step_rank": 3}
    model = model_class(config_class(**options | OPTIONS[family]))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.3)
    return model.to(dtype).eval()


def state(model):
    """Its tensors under their names in a file: what is tied once."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", ["1GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_transformers_writes(family, limit, dtype, tmp_path):
    model = theirs(family, dtype)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit == "20KB")
    models, _ = load_ranks(tmp_path, 4)
    assert models[0].dtype == dtype
    ours = {
        name: tensor.to(dtype) for name, tensor in merged(models).items()
    }  # A_log, D, dt bias are float32 here
    assert_same_bits(ours, state(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_saved(family, tmp_path):
    model = theirs(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "origin")
    MambaForCausalLM.from_pretrained(tmp_path / "origin").save_pretrained(tmp_path / "saved")
    shard_checkpoint(tmp_path / "origin", tmp_path / "shards", 3)
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    for folder in (tmp_path / "saved", tmp_path / "merged"):
        again, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert type(again) is type(model)
        assert again.dtype == torch.bfloat16
        assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))
        assert again.config.intermediate_size == model.config.intermediate_size


def test_transformers_loads_a_converted_raw_checkpoint(tmp_path):
    config = odd_config(vocab_size=104, hidden_size=32, intermediate_size=64)
    tensors = random_tensors(config)
    write_raw(tmp_path / "raw", config, tensors, usable_vocab_size=97)
    merge_checkpoint(tmp_path / "raw", tmp_path / "hf")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()), report
    assert isinstance(model, transformers.MambaForCausalLM)
    assert_same_bits(state(model), tensors)
