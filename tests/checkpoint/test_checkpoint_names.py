"""Whose names: what wraps a saved model is seen through, and what is something else is called by its name."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from checkpoint_samples import (
    assert_same_bits,
    load_ranks,
    merged,
    odd_config,
    random_tensors,
    read_folder,
    write_checkpoint,
)
from safetensors.torch import save_file

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.load import load_mixer, load_rank
from tp_mamba.checkpoint.names import common_prefixes
from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.config import MambaConfig
from tp_mamba.model import MambaForCausalLM, build_mixer

MIXER = "backbone.layers.1.mixer"
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture
def changed(tmp_path):
    """A function that writes a checkpoint whose tensors ``change`` has made anew."""

    def write(change, **options):
        config = odd_config(**options)
        tensors = random_tensors(config)
        return write_checkpoint(tmp_path / "origin", config, change(tensors)), tensors

    return write


def without_backbone(tensors):
    return {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}


def behind(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod."]
)
@pytest.mark.parametrize("options", [{}, UNTIED], ids=["tied", "untied"])
def test_a_prefix_of_every_name_is_seen_through(prefix, options, changed, tmp_path):
    folder, tensors = changed(behind(prefix), **options)
    assert_same_bits(merged(load_ranks(folder, 3)[0]), tensors)
    shard_checkpoint(folder, tmp_path / "shards", 2)
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    assert_same_bits(read_folder(tmp_path / "merged"), tensors)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_the_base_class_of_a_tied_model(prefix, changed):
    folder, tensors = changed(lambda tensors: behind(prefix)(without_backbone(tensors)))
    assert_same_bits(merged(load_ranks(folder, 2)[0]), tensors)


def test_what_the_base_class_of_transformers_saves(tmp_path):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97, time_step_rank=3)
    model = transformers.MambaModel(config)
    model.save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).last_hidden_state @ model.get_input_embeddings().weight.T
    ours = MambaForCausalLM.from_pretrained(tmp_path)
    assert (ours(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_base_class_of_an_untied_model_lacks_its_head(changed):
    folder, _ = changed(
        lambda tensors: without_backbone({n: t for n, t in tensors.items() if n != "lm_head.weight"}),
        **UNTIED,
    )
    with pytest.raises(
        CheckpointError, match=r"lacks lm_head\.weight.*has all else: give .* with its language-model head"
    ):
        MambaForCausalLM.from_pretrained(folder)


def test_a_prefix_of_some_names_is_not(changed):
    def wrap_one(tensors):
        return {name.replace(".1.mixer.", ".1._orig_mod.mixer."): tensor for name, tensor in tensors.items()}

    folder, _ = changed(wrap_one)
    with pytest.raises(
        CheckpointError, match=r"holds backbone\.layers\.1\._orig_mod\.mixer\.A_log, .*without its wrappers"
    ):
        MambaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"score.weight": torch.ones(2, 20)},
            r"holds score\.weight, the head of a classifier.*the language model",
        ),
        ({f"{MIXER}.in_proj.lora_A.weight": torch.ones(2, 20)}, r"lora_A\.weight, part of an adapter: merge"),
        ({f"{MIXER}.in_proj.lora_A.default.weight": torch.ones(2, 20)}, "part of an adapter: merge"),
        ({f"{MIXER}.in_proj.weight.absmax": torch.ones(2)}, r"absmax, part of a quantised weight: give"),
        ({f"{MIXER}.in_proj.weight_scale": torch.ones(1)}, r"weight_scale, part of a quantised weight: give"),
        (
            {f"{MIXER}.in_proj.qweight": torch.ones(1, dtype=torch.int32)},
            r"qweight, part of a quantised weight",
        ),
        (
            {f"{MIXER}.in_proj.weight": torch.ones(600, 1, dtype=torch.uint8)},
            r"in_proj\.weight has dtype uint8, supported are .*: its weights are quantised, so give the checkpoint",
        ),
        (
            {f"{MIXER}.out_proj.weight": torch.ones(20, 30).to(torch.float8_e4m3fn)},
            r"out_proj\.weight has dtype float8_e4m3fn, supported are .*: its weights are quantised, so give",
        ),
        (
            {f"{MIXER}.out_proj.weight": torch.ones(20, 30, dtype=torch.int64)},
            "int64, supported .*: convert the",
        ),
        (
            {f"{MIXER}.dt_bias": torch.ones(3)},
            r"dt_bias, which Mamba-2 layers have and Mamba-1 layers have not",
        ),
        (
            {f"{MIXER}.\x1b[31mgate": torch.ones(3)},
            r"holds backbone\.layers\.1\.mixer\.\\x1b\[31mgate, which its",
        ),
        (
            {f"{MIXER}.{'gate' * 1000}": torch.ones(3)},
            r"holds backbone\.layers\.1\.mixer\..*\.\.\..*gate, which its",
        ),
    ],
)
def test_every_cause_has_its_own_remedy(extra, message, changed):
    folder, _ = changed(lambda tensors: tensors | extra)
    with pytest.raises(CheckpointError, match=message) as refusal:
        MambaForCausalLM.from_pretrained(folder)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500


def test_names_of_no_family(changed):
    folder, _ = changed(
        lambda tensors: {f"transformer.h.{i}": tensor for i, tensor in enumerate(tensors.values())}
    )
    with pytest.raises(
        CheckpointError, match=r"none of the \d+ tensors .*, such as transformer\.h\.0, has a name"
    ):
        MambaForCausalLM.from_pretrained(folder)


def test_more_layers_than_the_files_hold_are_refused_before_a_model_is_built(changed, monkeypatch):
    folder, _ = changed(dict)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 4096}))
    monkeypatch.setattr(MambaForCausalLM, "__init__", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(
        CheckpointError, match="says num_hidden_layers 4096, the checkpoint holds 2 layers: use"
    ):
        MambaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "size"),
    [("vocab_size", 2**24), ("hidden_size", 2**24), ("intermediate_size", 2**24), ("state_size", 256)],
)
def test_sizes_are_held_against_the_files_before_memory_is_taken(key, size, changed):
    """2^24 rows of 2^24 would be a petabyte; the refusal takes none of it."""
    folder, _ = changed(dict)
    fields = json.loads((folder / "config.json").read_text()) | {key: size}
    fields.pop("expand", None)
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"has shape .*, config.json asks for .*: use the config.json"):
        MambaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("prefix", [MIXER, f"module.{MIXER}", "model.layers.1.mixer"])
def test_one_mixer_of_a_wrapped_model(prefix, changed):
    folder, tensors = changed(behind("module."))
    mixer = build_mixer(MambaConfig.from_pretrained(folder))
    load_mixer(mixer, folder, prefix)
    assert torch.equal(mixer.D, tensors[f"{MIXER}.D"])


def test_one_mixer_of_a_model_that_is_no_family_s(changed):
    """A hybrid's, whose config.json names a model type that nothing here builds."""
    folder, tensors = changed(dict)
    (folder / "config.json").write_text(json.dumps({"model_type": "hybrid"}))
    mixer = build_mixer(odd_config())
    load_mixer(mixer, folder, "model.layers.1.mixer")
    assert torch.equal(mixer.D, tensors[f"{MIXER}.D"])


def test_common_prefixes():
    assert list(common_prefixes(["a.b.c", "a.b.d"])) == ["", "a.", "a.b."]
    assert list(common_prefixes(["a.b.c", "a.bc"])) == ["", "a."]
    assert list(common_prefixes(["a.b"])) == ["", "a."]
    assert list(common_prefixes(["a.b", "b.c"])) == [""]
    assert list(common_prefixes(["", "b.c"])) == [""]
    assert list(common_prefixes([])) == [""]


def test_groups_are_strict_inside_and_optional_outside(tmp_path):
    """Tensors of another group may be absent together, and never in part."""
    config = odd_config()
    tensors = random_tensors(config)

    def model():
        made = MambaForCausalLM(config)
        for mixer in made.mixers():
            mixer.conv1d.shards["bias"] = replace(mixer.conv1d.shards["bias"], group="adapter")
        return made

    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("conv1d.bias")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in biases}
    first = next(iter(biases))
    base = write_checkpoint(tmp_path / "base", config, rest)
    part = write_checkpoint(tmp_path / "part", config, rest | {first: biases[first]})
    whole = write_checkpoint(tmp_path / "whole", config, tensors)
    (tmp_path / "adapter").mkdir()
    save_file(biases, tmp_path / "adapter" / "model.safetensors")

    made = model()
    before = made.mixers()[0].conv1d.bias.clone()
    load_rank(made, base)
    assert torch.equal(made.mixers()[0].conv1d.bias, before)
    with pytest.raises(CheckpointError, match=r"lacks backbone\.layers\.1\.mixer\.conv1d\.bias"):
        load_rank(model(), part)
    load_rank(made, tmp_path / "adapter", group="adapter")
    assert torch.equal(made.mixers()[0].conv1d.bias, biases[first])
    with pytest.raises(CheckpointError, match=r"lacks backbone\.embeddings\.weight"):
        load_rank(model(), tmp_path / "adapter")
    made = model()
    load_rank(made, whole)
    assert torch.equal(made.mixers()[0].conv1d.bias, biases[first])
