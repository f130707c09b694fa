"""Folders of per-rank files that are not as tp-mamba shard left them: refused, with what is wrong and what to do."""

import json
import shutil

import pytest
import torch
from checkpoint_samples import assert_same_bits, odd_config, random_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.shards import shard_checkpoint
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.config import MambaConfig


@pytest.fixture
def origin(tmp_path):
    config = odd_config(tie_word_embeddings=False, use_bias=True, intermediate_size=32, vocab_size=98)
    tensors = random_tensors(config)
    return write_checkpoint(tmp_path / "origin", config, tensors), tensors


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


ENTRY = {"dim": 0, "pieces": [2], "granularity": 1, "dtype": "F32"}


class TestDamagedShards:
    @pytest.fixture
    def shards(self, origin, tmp_path):
        shard_checkpoint(origin[0], tmp_path / "shards", 2)
        return tmp_path / "shards"

    def refuse(self, shards, message):
        with pytest.raises(CheckpointError, match=message) as refusal:
            open_source(shards)
        assert "\n" not in str(refusal.value)
        assert str(refusal.value).endswith("again with tp-mamba shard")
        assert "fetch" not in str(refusal.value)

    def test_missing_file(self, shards):
        (shards / "model-tp-00002-of-00002.safetensors").unlink()
        self.refuse(
            shards,
            r"model-tp-00002-of-00002\.safetensors is missing: copy it here, or make the shards again with tp-mamba",
        )

    def test_truncated_file(self, shards):
        path = shards / "model-tp-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.refuse(
            shards,
            "is not a whole safetensors file .* truncated or damaged, make it again with tp-mamba shard",
        )

    def test_file_without_a_tensor(self, shards):
        path = shards / "model-tp-00001-of-00002.safetensors"
        tensors = load_file(path)
        tensors.pop("lm_head.weight")
        save_file(tensors, path, metadata_of(path))
        self.refuse(shards, r"do not agree on lm_head\.weight: make the shards again")

    @pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.half()], ids=["shape", "dtype"])
    def test_file_with_another_tensor(self, shards, change):
        path = shards / "model-tp-00001-of-00002.safetensors"
        tensors = load_file(path)
        changed = tensors | {"lm_head.weight": change(tensors["lm_head.weight"]).contiguous()}
        save_file(changed, path, metadata_of(path))
        self.refuse(shards, r"lm_head\.weight in .* is \[4\d, 20\] .* says \[49, 20\] torch\.float32")

    def test_two_files_exchanged(self, shards):
        """Whose shapes are the same: nothing but the stamp tells."""
        one, two = (shards / f"model-tp-0000{rank}-of-00002.safetensors" for rank in (1, 2))
        one.rename(shards / "x")
        two.rename(one)
        (shards / "x").rename(two)
        self.refuse(
            shards, r"tp-00001-of-00002\.safetensors is the file of rank '1' of '2', and its .* of rank '0'"
        )

    def test_one_file_copied_over_another(self, shards):
        shutil.copy(
            shards / "model-tp-00001-of-00002.safetensors", shards / "model-tp-00002-of-00002.safetensors"
        )
        self.refuse(shards, r"is the file of rank '0' of '2', and its name is that of rank '1' of '2'")
        open_source(shards, rank=0, size=2)  # which reads the right one alone
        with pytest.raises(CheckpointError, match="is the file of rank '0'"):
            open_source(shards, rank=1, size=2)

    @pytest.mark.parametrize("name", ["model-tp-00002-of-00002.safetensors", "tp_mamba_shards.json"])
    def test_a_file_of_another_writing(self, name, shards, origin, tmp_path):
        tensors = {key: tensor + 1 for key, tensor in origin[1].items()}
        write_checkpoint(tmp_path / "other", MambaConfig.from_pretrained(origin[0]), tensors)
        shard_checkpoint(tmp_path / "other", tmp_path / "others", 2)
        shutil.copy(tmp_path / "others" / name, shards / name)
        self.refuse(
            shards,
            "is not of the same run of tp-mamba shard as tp_mamba_shards.json: copy all files of one run",
        )

    def test_a_file_without_its_stamp(self, shards):
        path = shards / "model-tp-00001-of-00002.safetensors"
        save_file(load_file(path), path, {"format": "pt"})
        self.refuse(shards, "does not say which rank's file it is")

    def test_version_1_is_read_and_less_of_it_checked(self, shards, origin):
        path = shards / "tp_mamba_shards.json"
        manifest = json.loads(path.read_text())
        del manifest["writing"]
        for entry in manifest["tensors"].values():
            entry["parts"] = max(1, len(entry.pop("pieces")))
            del entry["granularity"]
        path.write_text(json.dumps(manifest | {"version": 1}))
        for file in shards.glob("*.safetensors"):
            save_file(load_file(file), file, {"format": "pt"})
        source = open_source(shards)
        assert_same_bits({name: source.read_all(name) for name in source.names()}, origin[1])
        entry = manifest["tensors"]["backbone.layers.0.mixer.D"]
        for parts in (7, 10**9, 0, True):
            entry["parts"] = parts
            path.write_text(json.dumps(manifest | {"version": 1}))
            self.refuse(shards, "is damaged")

    def test_a_version_1_manifest_beside_newer_files(self, shards):
        path = shards / "tp_mamba_shards.json"
        manifest = json.loads(path.read_text())
        for entry in manifest["tensors"].values():
            entry["parts"] = max(1, len(entry.pop("pieces")))
        path.write_text(json.dumps(manifest | {"version": 1}))
        self.refuse(shards, "is not of the same run of tp-mamba shard")

    @pytest.mark.parametrize("rank_and_size", [(0, 1), (0, 2**31), (5, 7)])
    def test_claims_of_billions_of_ranks(self, rank_and_size, shards):
        """Each rank with one row of an immense tensor, and a file of rank 0 that agrees."""
        n, path = 2**31, shards / "tp_mamba_shards.json"
        manifest = json.loads(path.read_text()) | {"tp_size": n}
        manifest["tensors"] = {"a": ENTRY | {"shape": [n, 2], "pieces": [n]}}
        path.write_text(json.dumps(manifest))
        for owner in (0, 5):
            stamp = {"format": "pt", "rank": str(owner), "size": str(n), "writing": manifest["writing"]}
            name = f"model-tp-{owner + 1:05d}-of-{n:05d}.safetensors"
            save_file({"a": torch.ones(1, 2)}, shards / name, stamp)
        rank, size = rank_and_size
        if size == n:
            assert open_source(shards, rank=rank, size=size).read("a", 0, 0, 1).tolist() == [[1, 1]]
            return
        with pytest.raises(CheckpointError, match=rf"of-{n}\.safetensors is missing: copy it here, or make"):
            open_source(shards, rank=rank, size=size)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: "{", "is not JSON"),
            (lambda m: [], "holds a JSON list, it must be an object"),
            (lambda m: m | {"version": 3}, "is not a tp_mamba_shards manifest of version 2 or 1"),
            (lambda m: m | {"tp_size": 0}, "is damaged"),
            (lambda m: m | {"tp_size": "2"}, "is damaged"),
            (lambda m: m | {"tp_size": True}, "is damaged"),
            (lambda m: m | {"writing": None}, "is damaged"),
            (lambda m: m | {"writing": ""}, "is damaged"),
            (lambda m: m | {"tensors": [1]}, "is damaged"),
            (lambda m: m | {"tensors": {"a": ENTRY | {"shape": ["2"]}}}, "is damaged"),
            (lambda m: m | {"tensors": {"a": ENTRY | {"shape": [-2], "pieces": [-2]}}}, "is damaged"),
            (
                lambda m: m | {"tensors": {"a": ENTRY | {"shape": [10**30], "pieces": [10**30]}}},
                "do not agree on",
            ),
            (lambda m: m | {"tensors": {"a": {"shape": [2], "dim": 0}}}, "is damaged"),
            (
                lambda m: m | {"tensors": {"a": ENTRY | {"shape": [3], "pieces": [1, 1]}}},
                "is damaged",
            ),
            (
                lambda m: m | {"tensors": {"a": ENTRY | {"shape": [3], "granularity": 0}}},
                "is damaged",
            ),
            (
                lambda m: m | {"tensors": {"a": ENTRY | {"shape": [2], "dim": 1}}},
                "is damaged",
            ),
            (
                lambda m: m | {"tensors": {"a": ENTRY | {"shape": [2], "dtype": "X"}}},
                "is damaged",
            ),
        ],
    )
    def test_manifest(self, shards, change, message):
        path = shards / "tp_mamba_shards.json"
        changed = change(json.loads(path.read_text()))
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        self.refuse(shards, message)

    def test_reading_across_the_cut(self, shards, origin):
        source = open_source(shards)
        name = "backbone.layers.0.mixer.out_proj.weight"  # cut along dimension 1
        assert torch.equal(source.read(name, 1, 3, 28), origin[1][name][:, 3:28])
        assert torch.equal(source.read(name, 1, 4, 4), origin[1][name][:, 4:4])
        assert torch.equal(source.read_all(name), origin[1][name])
        norm = "backbone.norm_f.weight"
        assert torch.equal(source.read(norm, 0, 2, 5), origin[1][norm][2:5])
        with pytest.raises(CheckpointError, match="was cut along dimension 1 and rows 0 to 2 of dimension 0"):
            source.read(name, 0, 0, 2)
