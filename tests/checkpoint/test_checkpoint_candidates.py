"""Two sets of weights in one folder: one that is certain is read, else none. And what is there instead of weights."""

import json
import os

import pytest
import torch
from checkpoint_samples import odd_config, random_tensors, write_checkpoint, write_indexed
from layout_samples import (
    refuse,
    write_bin,
    write_index,
    write_indexed_bin,
    write_indexed_safetensors,
    write_safetensors,
)
from safetensors.torch import save_file
from transformers import MambaConfig as HFConfig
from transformers import MambaForCausalLM as HFModel

from tp_mamba.checkpoint.config import read_family
from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.location import resolve
from tp_mamba.checkpoint.shards import shard_checkpoint
from tp_mamba.checkpoint.sources.candidates import Layout, find_weights
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.errors import ConfigError
from tp_mamba.model import MambaForCausalLM

TWICE = "holds weights twice, {} and {}, and nothing tells which are meant: remove the ones or the others"
INDEXED = {
    "safetensors": r"model\.safetensors\.index\.json with its 3 files \(model-a\.safetensors, \.\.\.\)",
    "bin": r"pytorch_model\.bin\.index\.json with its 3 files \(pytorch_model-a\.bin, \.\.\.\)",
}
SINGLE = {"safetensors": r"model\.safetensors", "bin": r"pytorch_model\.bin"}


def write(folder, kind, several):
    writers = {
        ("safetensors", False): write_safetensors,
        ("safetensors", True): write_indexed_safetensors,
        ("bin", False): write_bin,
        ("bin", True): write_indexed_bin,
    }
    writers[kind, several](folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
class TestSavedTwice:
    def test_both_whole(self, kind, tmp_path):
        write(tmp_path, kind, True)
        write(tmp_path, kind, False)
        refuse(tmp_path, TWICE.format(INDEXED[kind], SINGLE[kind]))

    def test_the_index_of_an_older_checkpoint(self, kind, tmp_path):
        """transformers removes the files of an older save, and not their index."""
        write(tmp_path, kind, True)
        next(tmp_path.glob("*-b.*")).unlink()
        refuse(tmp_path, "which is missing: fetch it, the checkpoint is not whole")
        write(tmp_path, kind, False)
        assert find_weights(tmp_path).weight_map is None
        assert open_source(tmp_path).names() == ["a", "b", "c"]

    def test_an_index_of_the_single_file(self, kind, tmp_path):
        write(tmp_path, kind, False)
        name = SINGLE[kind].replace("\\", "")
        write_index(tmp_path / f"{name}.index.json", dict.fromkeys("abc", name))
        assert find_weights(tmp_path).weight_map == dict.fromkeys("abc", tmp_path / name)
        assert open_source(tmp_path).names() == ["a", "b", "c"]


@pytest.mark.parametrize("several", [False, True])
def test_safetensors_go_before_bin(several, tmp_path):
    write(tmp_path, "bin", not several)
    write(tmp_path, "safetensors", several)
    assert find_weights(tmp_path).layout is Layout.SAFETENSORS
    assert type(open_source(tmp_path)).__name__ == "SafetensorsSource"


class TestShards:
    @pytest.fixture
    def shards(self, tmp_path):
        config = odd_config()
        write_checkpoint(tmp_path / "origin", config, random_tensors(config))
        shard_checkpoint(tmp_path / "origin", tmp_path / "shards", 2)
        return tmp_path / "shards"

    @pytest.mark.parametrize("kind", ["single", "several", "bin"])
    def test_and_published_files(self, shards, kind):
        tensors = random_tensors(odd_config(), seed=1)
        if kind == "single":
            write_checkpoint(shards, odd_config(), tensors)
            other = r"model\.safetensors"
        elif kind == "several":
            write_indexed(shards, odd_config(), tensors)
            other = r"model\.safetensors\.index\.json with its 3 files \(model-00001-of-00003\.safetensors, \.\.\.\)"
        else:
            torch.save(tensors, shards / "pytorch_model.bin")
            other = r"pytorch_model\.bin"
        refuse(shards, TWICE.format(r"tp_mamba_shards\.json with its model-tp-\*-of-\*\.safetensors", other))
        for path in shards.glob("model-tp-*"):
            path.unlink()
        assert find_weights(shards).layout is not Layout.SHARDS  # a manifest alone is of an older checkpoint
        assert torch.equal(
            open_source(shards).read_all("backbone.norm_f.weight"), tensors["backbone.norm_f.weight"]
        )

    def test_transformers_saves_over_them(self, shards, tmp_path):
        """It removes the files, whose names look like its own, and leaves the manifest."""
        HFModel.from_pretrained(tmp_path / "origin").save_pretrained(shards)
        assert (shards / "tp_mamba_shards.json").is_file()
        assert find_weights(shards).files == (shards / "model.safetensors",)
        MambaForCausalLM.from_pretrained(shards)

    def test_saving_over_them_leaves_one_checkpoint(self, shards):
        MambaForCausalLM.from_pretrained(shards).save_pretrained(shards)
        assert sorted(os.listdir(shards)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("order", [("whole", "pieces"), ("pieces", "whole")])
def test_what_transformers_leaves(order, tmp_path):
    """Never other weights than transformers reads from the same folder, unless with a word."""
    size = {"whole": "1GB", "pieces": "8KB"}
    options = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "state_size": 4}
    for shard_size in order:
        model = HFModel(HFConfig(**options))
        model.save_pretrained(tmp_path, max_shard_size=size[shard_size])
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert (tmp_path / "model.safetensors").is_file()
    if order[-1] == "pieces":  # and transformers reads the older file
        with pytest.raises(CheckpointError, match="holds weights twice"):
            MambaForCausalLM.from_pretrained(tmp_path)
        return
    ids = torch.arange(7)[None]
    ours = MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids)
    theirs = HFModel.from_pretrained(tmp_path)(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert torch.equal(theirs, model(ids).logits)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapter(name, tmp_path):
    (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    alone = (
        f"holds an adapter alone \\({name}\\), not the model that it belongs to: merge it into its base model"
    )
    beside = (
        f"holds an adapter beside the model \\({name}\\), which would not be read: merge it into the weights"
    )
    refuse(tmp_path, alone)
    with pytest.raises(CheckpointError, match=alone):
        MambaForCausalLM.from_pretrained(tmp_path)
    write_checkpoint(tmp_path, odd_config(), random_tensors(odd_config()))
    refuse(tmp_path, beside)
    with pytest.raises(CheckpointError, match=beside):
        resolve(tmp_path)
    (tmp_path / name).unlink()
    MambaForCausalLM.from_pretrained(tmp_path)


def test_what_is_there_instead_of_weights(tmp_path):
    refuse(tmp_path, "holds no weights, neither model.safetensors nor pytorch_model.bin .*: give the folder")
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    refuse(
        tmp_path, r"holds model-00001-of-00002\.safetensors, but neither .* nor an index that names it: copy"
    )
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    refuse(tmp_path, r"holds model-Q4_K_M\.gguf, weights quantised for llama\.cpp, .* in safetensors")
    with pytest.raises(ConfigError, match=r"holds model-Q4_K_M\.gguf, weights quantised for llama\.cpp"):
        read_family(tmp_path)  # and has no config.json
    write_safetensors(tmp_path)
    assert open_source(tmp_path).names() == ["a", "b", "c"]


class TestIndexThatIsNotToBeTrusted:
    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("./model-a.safetensors", r"points at \./model-a\.safetensors, outside its folder"),
            ("x//model-a.safetensors", "outside its folder"),
            ("a\0b", r"points at a\\x00b, outside its folder"),
            ("", "outside its folder"),
            ("n" * 5000, "which is missing|which cannot be opened"),
            ("\x1b[2J", r"names \\x1b\[2J, which is missing"),
            ("\ud800", r"\\ud800"),
        ],
    )
    def test_odd_names(self, file, message, tmp_path):
        write_indexed_safetensors(tmp_path)
        path = tmp_path / "model.safetensors.index.json"
        weight_map = json.loads(path.read_text())["weight_map"]
        write_index(path, weight_map | {"0": file})
        refuse(tmp_path, message)
        with pytest.raises(CheckpointError) as refusal:
            open_source(tmp_path)
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 1200

    def test_loop_of_links(self, tmp_path):
        write_indexed_safetensors(tmp_path)
        (tmp_path / "model-a.safetensors").unlink()
        (tmp_path / "model-a.safetensors").symlink_to("model-a.safetensors")
        refuse(tmp_path, "model-a.safetensors")

    def test_a_million_files_that_are_not_there(self, tmp_path, monkeypatch):
        """Work is in proportion to the files that are there."""
        write_index(
            tmp_path / "model.safetensors.index.json",
            {str(i): f"{i}.safetensors" for i in range(10**4)},
        )
        looked = []
        monkeypatch.setattr(
            "tp_mamba.checkpoint.sources.candidates._inside",
            lambda index, file: looked.append(file) or index.parent / file,
        )
        refuse(tmp_path, r"names 0\.safetensors, which is missing")
        assert len(looked) < 10
