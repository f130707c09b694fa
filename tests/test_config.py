"""MambaConfig: the published dialects, what is refused, and what is written back."""

import dataclasses
import json

import pytest
import torch
import transformers

from tp_mamba.checkpoint.errors import CheckpointError, ConfigError
from tp_mamba.config import MambaConfig

RAW = {
    "d_model": 2560,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
HF = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "hidden_size": 2560,
    "num_hidden_layers": 64,
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "intermediate_size": 5120,
    "time_step_rank": 160,
    "vocab_size": 50280,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "time_step_min": 0.001,
    "initializer_range": 0.1,
    "d_model": 2560,
    "ssm_cfg": {},
    "pad_vocab_size_multiple": 8,
}
FALCON = {
    "architectures": ["FalconMambaForCausalLM"],
    "model_type": "falcon_mamba",
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "expand": 16,
    "num_hidden_layers": 64,
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": 256,
    "vocab_size": 65024,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 11,
    "pad_token_id": 11,
    "torch_dtype": "bfloat16",
}
JAMBA = {
    "model_type": "jamba",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 65536,
    "eos_token_id": [2, 518],
    "num_attention_heads": 32,
    "torch_dtype": "bfloat16",
}


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


def without(fields, *keys):
    return {key: value for key, value in fields.items() if key not in keys}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (without(HF, "hidden_size"), "the field hidden_size is missing and has no default: add it, or take"),
        (
            without(HF, "num_hidden_layers"),
            "the field num_hidden_layers is missing and has no default: add it, or take",
        ),
        (
            without(FALCON, "vocab_size"),
            "the field vocab_size is missing and has no default: add it, or take",
        ),
        (without(RAW, "n_layer"), "the field n_layer is missing and has no default: add it, or take"),
        (without(RAW, "d_model"), "there is neither model_type nor d_model"),
        (HF | {"hidden_size": "768"}, "hidden_size is '768', it must be a whole number: correct it"),
        (HF | {"hidden_size": True}, "hidden_size is True, it must be a whole number: correct it"),
        (HF | {"use_bias": 1}, "use_bias is 1, it must be true or false: correct it"),
        (
            HF | {"layer_norm_epsilon": "1e-5"},
            "layer_norm_epsilon is '1e-5', it must be a finite number: correct it",
        ),
        (HF | {"expand": float("inf")}, "expand is inf, it must be a finite number: correct it"),
        (HF | {"eos_token_id": "end"}, "eos_token_id is 'end', it must be a whole number: correct it"),
        (RAW | {"ssm_cfg": []}, "ssm_cfg is \\[\\], it must be an object: correct it"),
        (HF | {"model_type": "mamba2"}, "model_type 'mamba2' is not a Mamba-1 model"),
        (HF | {"model_type": ["mamba"]}, "is not a Mamba-1 model"),
        (HF | {"model_type": "llama"}, "model_type 'llama' is not a Mamba-1 model"),
        (
            RAW | {"ssm_cfg": {"layer": "Mamba2"}},
            "ssm_cfg.layer is 'Mamba2', only 'Mamba1' is supported: give a checkpoint",
        ),
        (
            RAW | {"ssm_cfg": {"layer": "Mamba3"}},
            "ssm_cfg.layer is 'Mamba3', only 'Mamba1' is supported: give a checkpoint",
        ),
        (
            HF | {"ssm_cfg": {"layer": "Mamba2"}},
            "ssm_cfg.layer is 'Mamba2', only 'Mamba1' is supported: give a checkpoint",
        ),
        (RAW | {"ssm_cfg": {"headdim": 64}}, "ssm_cfg has 'headdim'"),
        (
            RAW | {"attn_layer_idx": [3, 9]},
            "attn_layer_idx is \\[3, 9\\], and attention layers are not supported: give a checkpoint",
        ),
        (
            RAW | {"d_intermediate": 4096},
            "d_intermediate is 4096, and MLP blocks are not supported: give a checkpoint",
        ),
        (RAW | {"rms_norm": False}, "rms_norm is false, and blocks with LayerNorm are not supported: give"),
        (RAW | {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
        (HF | {"intermediate_size": 4096}, "intermediate_size is 4096 but expand \\* hidden_size is 5120"),
        (
            HF | {"d_model": 768},
            "d_model is 768 but hidden_size is 2560, two names of one size: correct one of them",
        ),
        (
            HF | {"n_layer": 24},
            "n_layer is 24 but num_hidden_layers is 64, two names .*, or leave n_layer out",
        ),
        (HF | {"d_inner": 1536}, "d_inner is 1536 but intermediate_size is 5120, two names of one size"),
        (
            without(HF, "intermediate_size") | {"d_inner": 1},
            "d_inner is 1 but intermediate_size is 5120, two",
        ),
        (FALCON | {"d_model": 2048}, "d_model is 2048 but hidden_size is 4096, two names of one size"),
        (HF | {"d_model": "2560"}, "d_model is '2560', it must be a whole number"),
        (HF | {"time_step_rank": 0}, "time_step_rank is 0, it must be at least 1"),
        (HF | {"time_step_rank": "half"}, "time_step_rank is 'half'"),
        (
            HF | {"hidden_act": "relu"},
            "hidden_act is 'relu', supported are silu, swish: give a model that keeps to this, or correct",
        ),
        (
            HF | {"conv_kernel": 5},
            "conv_kernel is 5, the kernels take widths 2 to 4: give a model that keeps to this, or correct",
        ),
        (
            HF | {"conv_kernel": 1},
            "conv_kernel is 1, the kernels take widths 2 to 4: give a model that keeps to this, or correct",
        ),
        (
            HF | {"state_size": 300},
            "state_size is 300, the kernels take 1 to 256: give a model that keeps to this, or correct",
        ),
        (
            HF | {"state_size": 0},
            "state_size is 0, the kernels take 1 to 256: give a model that keeps to this, or correct",
        ),
        (HF | {"vocab_size": -1}, "vocab_size is -1, it must be at least 1"),
        (HF | {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05, it must be a finite number"),
        (
            HF | {"torch_dtype": "int8"},
            "dtype is 'int8', supported are float16, bfloat16, float32, float64: name the one",
        ),
        (HF | {"usable_vocab_size": 50281}, "usable_vocab_size is 50281, it must be 1 to vocab_size"),
        (JAMBA | {"mamba_d_conv": 5}, "conv_kernel is 5"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        MambaConfig.from_dict(fields)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    _, _, remedy = sentence.partition(": ")
    assert remedy.split(" ")[0].rstrip(",") in ("add", "correct", "give", "name"), sentence


def test_file_errors_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} has no config.json"):
        MambaConfig.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{broken")
    with pytest.raises(ConfigError, match=f"{path} is not JSON"):
        MambaConfig.from_pretrained(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=f"{path} is not JSON"):
        MambaConfig.from_pretrained(tmp_path)
    path.write_text("[]")
    with pytest.raises(
        ConfigError, match="holds a JSON list, it must be an object of fields: fetch or write it again"
    ):
        MambaConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(HF | {"conv_kernel": 5}))
    with pytest.raises(ConfigError, match=f"{path}: conv_kernel is 5"):
        MambaConfig.from_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):
        MambaConfig.from_pretrained(tmp_path / "nowhere")


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
