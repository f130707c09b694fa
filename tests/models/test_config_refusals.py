"""MambaConfig: what is refused, in which words, and what is no reason to refuse."""

import dataclasses
import json

import pytest
import transformers
from config_samples import FALCON, HF, JAMBA, RAW, without

from tp_mamba.checkpoint.errors import CheckpointError, ConfigError
from tp_mamba.config import MambaConfig


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
        (
            without(HF, "intermediate_size") | {"expand": float("inf")},
            "expand is inf, it must be a finite number: correct it",
        ),
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
            "dtype is 'int8', supported are float32, bfloat16, float16, float64: name the one",
        ),
        (HF | {"usable_vocab_size": 50281}, "usable_vocab_size is 50281, it must be 1 to vocab_size"),
        (JAMBA | {"mamba_d_conv": 5}, "conv_kernel is 5"),
        (
            HF | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantization_config declares 'bitsandbytes' weights, and supported are dense.*: give the checkpoint",
        ),
        (
            FALCON | {"quantization_config": {"load_in_8bit": True}},
            "quantization_config declares weights quantised in a way that it does not name, and supported are dense",
        ),
        (
            JAMBA | {"compression_config": {"quant_method": "fp8"}},
            "compression_config declares 'fp8' weights",
        ),
        (RAW | {"quantization_config": {"quant_method": "gptq"}}, "declares 'gptq' weights"),
        (HF | {"quantization_config": "int8"}, "quantization_config is 'int8', it must be an object"),
        (
            HF | {"num_hidden_layers": 2**31 - 1},
            "num_hidden_layers is 2147483647, it must be at most 4,096: correct",
        ),
        (HF | {"hidden_size": 10**30}, "hidden_size is 10{30}, it must be at most 16,777,216: correct it"),
        (HF | {"hidden_size": 10**400}, "hidden_size is <1329 bits>, it must be at most"),
        (HF | {"intermediate_size": 2**24 + 1}, "intermediate_size is 16777217, it must be at most"),
        (HF | {"vocab_size": 10**18}, "vocab_size is 10{18}, it must be at most"),
        (HF | {"time_step_rank": 10**18}, "time_step_rank is 10{18}, it must be at most"),
        (HF | {"state_size": 10**400}, "state_size is <1329 bits>, the kernels take 1 to 256: give a model"),
        (
            HF | {"layer_norm_epsilon": 10**400},
            "layer_norm_epsilon is <1329 bits>, it must be a finite number",
        ),
        (
            RAW | {"ssm_cfg": {"expand": 1e308}},
            "expand is 1e\\+308, which is no width of a layer: correct it",
        ),
        (RAW | {"norm_epsilon": -1}, "layer_norm_epsilon is -1, it must be a finite number of at least 0"),
        (RAW | {"norm_epsilon": "small"}, "norm_epsilon is 'small', it must be a finite number"),
        (
            HF | {"hidden_act": "\x1b[31m" + 10**4 * "a"},
            r"hidden_act is '\\x1b\[31maaa.*\.\.\..*, supported are silu",
        ),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        MambaConfig.from_dict(fields)
    sentence = str(refusal.value)
    assert sentence.isprintable()
    assert len(sentence) < 400
    _, _, remedy = sentence.partition(": ")
    assert remedy.split(" ")[0].rstrip(",") in ("add", "correct", "give", "name"), sentence


@pytest.mark.parametrize("fields", [HF, FALCON], ids=["mamba", "falcon"])
@pytest.mark.parametrize(
    "inert",
    [
        {"d_model": 768},
        {"d_model": "2560"},
        {"n_layer": 24},
        {"d_inner": 1536},
        {"expand": 3},
        {"expand": 2.5},
        {"expand": "twice"},
        {"ssm_cfg": []},
    ],
    ids=str,
)
def test_a_key_that_decides_nothing_is_no_reason_to_refuse(fields, inert, tmp_path):
    """transformers takes D from intermediate_size where it stands, and never looks at the names of raw files."""
    config = MambaConfig.from_dict(fields | inert)
    assert config == MambaConfig.from_dict(fields)
    if inert.get("expand") in (None, 3):  # whose type transformers checks, whatever its value
        (tmp_path / "config.json").write_text(json.dumps(fields | inert))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            assert getattr(config, name) == getattr(theirs, name), name


def test_sizes_given_by_hand_are_checked_too():
    config = MambaConfig.from_dict(HF)
    for size in (1.5, "2560", None):
        with pytest.raises(ConfigError, match=f"hidden_size is {size!r}, it must be a whole number"):
            dataclasses.replace(config, hidden_size=size)


def test_an_inert_key_is_not_written_back_wrong():
    assert MambaConfig.from_dict(HF | {"expand": 3, "d_model": 7}).to_dict()["expand"] == 2
    assert "d_model" not in MambaConfig.from_dict(HF | {"d_model": 7}).to_dict()


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"a": ' + 10**5 * "[" + 10**5 * "]" + "}", "nested too deeply"),
        ('{"model_type": "mamba", "a": "\\ud800"}', "holds half of a surrogate pair, which is no text"),
        (json.dumps(HF).replace("2560", "1e400", 1), "hidden_size is inf, it must be a whole number"),
        (json.dumps(HF).replace("1e-05", "1e400"), "layer_norm_epsilon is inf, it must be a finite number"),
        (json.dumps(HF).replace("1e-05", "NaN"), "layer_norm_epsilon is nan, it must be a finite number"),
        (json.dumps(HF).replace("2560", "9" * 4000, 1), "hidden_size is <13288 bits>, it must be at most"),
    ],
    ids=["digits", "nested", "surrogate", "huge size", "huge float", "nan", "huge integer"],
)
def test_what_a_library_chokes_on_is_said_with_the_files_name(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as refusal:
        MambaConfig.from_pretrained(tmp_path)
    sentence = str(refusal.value)
    assert str(tmp_path / "config.json") in sentence
    assert sentence.isprintable()
    assert len(sentence) < 400 + len(str(tmp_path))
