"""MambaConfig: the published dialects, and what is written back."""

import dataclasses
import json

import pytest
import torch
import transformers
from config_samples import FALCON, HF, JAMBA, RAW, without

from tp_mamba.config import MambaConfig
from tp_mamba.layers import weights
from tp_mamba.model import build_mixer
from tp_mamba.models import config as bare


def test_raw_state_spaces():
    config = MambaConfig.from_dict(RAW)
    assert config == MambaConfig(
        model_type="mamba",
        hidden_size=2560,
        intermediate_size=5120,
        num_hidden_layers=64,
        state_size=16,
        conv_kernel=4,
        time_step_rank=160,
        vocab_size=50280,
        usable_vocab_size=50277,
        bos_token_id=0,
        eos_token_ids=(0,),
        pad_token_id=0,
    )


def test_raw_honours_every_layer_option():
    ssm_cfg = {"layer": "Mamba1", "d_state": 24, "d_conv": 3, "expand": 1.5, "dt_rank": 7, "bias": True}
    config = MambaConfig.from_dict(
        RAW | {"ssm_cfg": ssm_cfg | {"conv_bias": False, "dt_min": 0.01}, "tie_embeddings": False}
    )
    assert (config.state_size, config.conv_kernel, config.intermediate_size, config.time_step_rank) == (
        24,
        3,
        3840,
        7,
    )
    assert (config.use_bias, config.use_conv_bias, config.tie_word_embeddings) == (True, False, False)


def test_raw_reads_the_epsilon_and_the_ids_that_it_declares():
    config = MambaConfig.from_dict(RAW | {"norm_epsilon": 1e-2, "eos_token_id": [3, 5], "bos_token_id": 1})
    assert (config.layer_norm_epsilon, config.eos_token_ids, config.bos_token_id) == (1e-2, (3, 5), 1)
    assert MambaConfig.from_dict(config.to_dict()) == config
    assert MambaConfig.from_dict(RAW).layer_norm_epsilon == 1e-5


def test_mamba_hf():
    config = MambaConfig.from_dict(HF)
    assert (config.hidden_size, config.intermediate_size, config.time_step_rank) == (2560, 5120, 160)
    assert config.dtype is torch.float32
    assert config.tie_word_embeddings  # absent in the published files
    assert config.mixer_norm == "none"
    assert config.usable_vocab_size is None
    assert config.eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("fields", "D"),
    [
        ({"expand": 3}, 7680),
        ({"intermediate_size": 5000}, 5000),
        ({"intermediate_size": 5000, "expand": 3}, 5000),
        ({"intermediate_size": None, "expand": 3}, 7680),
        ({}, 5120),
    ],
)
def test_mamba_inner_size_from_what_is_given(fields, D):
    bare = {key: value for key, value in HF.items() if key not in ("expand", "intermediate_size")}
    assert MambaConfig.from_dict(bare | fields).intermediate_size == D


def test_falcon_mamba_traps():
    config = MambaConfig.from_dict(FALCON)
    assert config.intermediate_size == 8192  # expand 16 would say 65536
    assert not config.tie_word_embeddings
    assert (config.mixer_norm, config.mixer_rms_eps) == ("weightless", 1e-6)  # absent in the file
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (0, (11,), 11)
    assert config.dtype is torch.bfloat16


def test_jamba_mixer():
    config = MambaConfig.from_dict(JAMBA)
    assert config.intermediate_size == 8192  # 14336 is the MLP's
    assert (config.mixer_norm, config.mixer_rms_eps, config.layer_norm_epsilon) == ("weighted", 1e-6, 1e-6)
    assert not config.tie_word_embeddings
    assert not config.residual_in_fp32
    assert config.eos_token_ids == (2, 518)
    assert config.bos_token_id == 1


@pytest.mark.parametrize("rank", ["auto", None])
def test_rank_auto_rounds_up(rank):
    fields = without(HF, "time_step_rank", "d_model")
    fields |= {"hidden_size": 33, "intermediate_size": 66} | ({"time_step_rank": rank} if rank else {})
    assert MambaConfig.from_dict(fields).time_step_rank == 3


def test_legacy_duplicates_that_agree():
    legacy = {"d_model": 2560, "n_layer": 64, "d_inner": 5120}
    config = MambaConfig.from_dict(HF | legacy)
    assert config == MambaConfig.from_dict(without(HF, "d_model"))
    shrunk = dataclasses.replace(
        config, num_hidden_layers=2
    ).to_dict()  # would contradict n_layer, if that were kept
    assert MambaConfig.from_dict(shrunk).num_hidden_layers == 2


@pytest.mark.parametrize("family", ["Mamba", "FalconMamba", "Jamba"])
@pytest.mark.parametrize("hidden_size", [40, 64])
def test_defaults_are_those_of_transformers(family, hidden_size):
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": 2, "vocab_size": 97}
    theirs = getattr(transformers, f"{family}Config")(**sizes)
    ours = MambaConfig.from_dict(sizes | {"model_type": theirs.model_type})
    same = {
        name: name for name in (*sizes, "hidden_act", "tie_word_embeddings", "bos_token_id", "pad_token_id")
    }
    if family == "Jamba":
        same |= {
            "state_size": "mamba_d_state",
            "conv_kernel": "mamba_d_conv",
            "time_step_rank": "mamba_dt_rank",
        }
        same |= {"use_bias": "mamba_proj_bias", "use_conv_bias": "mamba_conv_bias"}
        same |= {"layer_norm_epsilon": "rms_norm_eps", "mixer_rms_eps": "rms_norm_eps"}
        assert ours.intermediate_size == theirs.mamba_expand * hidden_size
    else:
        names = ("intermediate_size", "state_size", "conv_kernel", "time_step_rank", "layer_norm_epsilon")
        names += ("use_bias", "use_conv_bias", "residual_in_fp32")
        same |= {name: name for name in names}
    if family == "FalconMamba":
        same["mixer_rms_eps"] = "mixer_rms_eps"
    for name, their_name in same.items():
        assert getattr(ours, name) == getattr(theirs, their_name), name
    assert ours.eos_token_ids == (theirs.eos_token_id,)


def test_eos_null_is_none():
    assert MambaConfig.from_dict(HF | {"eos_token_id": None}).eos_token_ids == ()


def test_dtype_of_transformers_5_and_auto():
    assert MambaConfig.from_dict(FALCON | {"dtype": "float16"}).dtype is torch.float16
    assert MambaConfig.from_dict(HF | {"torch_dtype": "auto"}).dtype is None


@pytest.mark.parametrize("fields", [RAW, HF, FALCON, JAMBA], ids=["raw", "mamba", "falcon", "jamba"])
def test_to_dict_reads_back_as_the_same_model(fields):
    config = MambaConfig.from_dict(fields)
    written = config.to_dict()
    assert MambaConfig.from_dict(json.loads(json.dumps(written))) == config
    assert written["architectures"][0].endswith("ForCausalLM")


def test_to_dict_keeps_fields_of_the_original_file():
    written = MambaConfig.from_dict(HF).to_dict()
    assert written["time_step_min"] == 0.001
    assert written["initializer_range"] == 0.1
    assert written["dtype"] == "float32"
    assert MambaConfig.from_dict(FALCON).to_dict()["expand"] == 16
    assert MambaConfig.from_dict(JAMBA).to_dict()["intermediate_size"] == 14336


def test_odd_inner_size_survives():
    config = MambaConfig.from_dict(without(HF, "expand") | {"intermediate_size": 5001})
    assert "expand" not in config.to_dict()
    assert MambaConfig.from_dict(config.to_dict()) == config
    jamba = MambaConfig.from_dict(JAMBA | {"hidden_size": 20, "mamba_expand": 1.5})
    assert MambaConfig.from_dict(jamba.to_dict()).intermediate_size == 30


def test_the_kind_of_the_weights_is_the_method_of_quantisation_if_it_is_registered(monkeypatch):
    assert MambaConfig.from_dict(HF | {"quantization_config": None}).weight_kind == "dense"
    monkeypatch.setitem(weights._KINDS, "two_bits", weights.Dense())
    quantized = HF | {"quantization_config": {"quant_method": "two_bits", "group": 64}}
    config = MambaConfig.from_dict(quantized)
    assert config.weight_kind == "two_bits"
    assert config.to_dict()["quantization_config"] == quantized["quantization_config"]
    by_hand = dataclasses.replace(MambaConfig.from_dict(HF), weight_kind="two_bits")
    assert MambaConfig.from_dict(by_hand.to_dict()) == by_hand
    assert build_mixer(config, device="meta").in_proj.kind is weights.get_weight_kind("two_bits")


@pytest.mark.parametrize("fields", [RAW, HF, FALCON], ids=["raw", "mamba", "falcon"])
def test_transformers_reads_what_is_written(fields, tmp_path):
    config = MambaConfig.from_dict(fields)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for name in (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "state_size",
        "conv_kernel",
    ):
        assert getattr(theirs, name) == getattr(config, name), name
    for name in (
        "time_step_rank",
        "vocab_size",
        "layer_norm_epsilon",
        "use_bias",
        "use_conv_bias",
        "hidden_act",
    ):
        assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    assert theirs.residual_in_fp32 == config.residual_in_fp32
    assert theirs.dtype == config.dtype
    assert (theirs.eos_token_id, theirs.bos_token_id) == (config.eos_token_ids[0], config.bos_token_id)
    if config.model_type == "falcon_mamba":
        assert theirs.mixer_rms_eps == config.mixer_rms_eps


@pytest.mark.parametrize("family", ["Mamba", "FalconMamba", "Jamba"])
def test_reads_what_transformers_writes(family, tmp_path):
    extra = (
        {}
        if family == "Jamba"
        else {"state_size": 24, "conv_kernel": 3, "expand": 3, "tie_word_embeddings": False}
    )
    theirs = getattr(transformers, f"{family}Config")(
        hidden_size=40, num_hidden_layers=2, vocab_size=97, **extra
    )
    theirs.save_pretrained(tmp_path)
    config = MambaConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (40, 2, 97)
    assert config.time_step_rank == 3
    if family == "Jamba":
        assert (config.intermediate_size, config.state_size, config.conv_kernel) == (80, 16, 4)
    else:
        assert (config.intermediate_size, config.state_size, config.conv_kernel) == (120, 24, 3)
    assert not config.tie_word_embeddings


def test_hashable_and_comparable():
    assert hash(MambaConfig.from_dict(HF)) == hash(MambaConfig.from_dict(HF | {"use_cache": True}))


def test_the_class_with_the_way_to_files_and_the_one_without_are_comparable():
    public, inner = MambaConfig.from_dict(HF), bare.MambaConfig.from_dict(HF | {"use_cache": True})
    assert public == inner
    assert inner == public
    assert hash(public) == hash(inner)
    assert inner != MambaConfig.from_dict(HF | {"layer_norm_epsilon": 1e-3})
    assert inner != dataclasses.asdict(inner)
