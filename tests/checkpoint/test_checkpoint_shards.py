"""One file per rank: the same bits at the same and at other rank counts, and nothing read in vain."""

import json
import resource

import pytest
import torch
from checkpoint_samples import (
    assert_same_bits,
    load_ranks,
    merged,
    odd_config,
    random_tensors,
    read_folder,
    write_checkpoint,
    write_indexed,
    write_raw,
)
from safetensors.torch import load_file

from tp_mamba.checkpoint.errors import CheckpointError, CheckpointWriteError
from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.checkpoint.sources.open import open_source
from tp_mamba.config import MambaConfig


@pytest.fixture
def origin(tmp_path):
    config = odd_config(tie_word_embeddings=False, use_bias=True)
    tensors = random_tensors(config)
    tensors["backbone.layers.0.mixer.A_log"] = tensors[
        "backbone.layers.0.mixer.A_log"
    ].bfloat16()  # mixed dtypes
    folder = write_indexed(tmp_path / "origin", config, tensors)
    (folder / "tokenizer.json").write_text("{}")
    return folder, tensors


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_shard_then_merge_is_bit_equal(n, origin, tmp_path):
    folder, tensors = origin
    shard_checkpoint(folder, tmp_path / "shards", n)
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    assert_same_bits(read_folder(tmp_path / "merged"), tensors)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert MambaConfig.from_pretrained(tmp_path / "merged") == MambaConfig.from_pretrained(folder)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-tp-{rank:05d}-of-{n:05d}.safetensors" for rank in range(1, n + 1)]


@pytest.mark.parametrize(("made_for", "loaded_at"), [(4, 3), (4, 4), (4, 1), (3, 4), (1, 5), (8, 2), (2, 7)])
def test_load_at_any_rank_count(made_for, loaded_at, origin, tmp_path):
    folder, tensors = origin
    shard_checkpoint(folder, tmp_path / "shards", made_for)
    models, _ = load_ranks(tmp_path / "shards", loaded_at)
    direct, _ = load_ranks(folder, loaded_at)
    for model, expected in zip(models, direct, strict=True):
        for (name, param), (_, other) in zip(
            model.named_parameters(), expected.named_parameters(), strict=True
        ):
            assert torch.equal(param, other), name
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    assert_same_bits(merged(models), wide)


def test_shards_of_shards(origin, tmp_path):
    folder, tensors = origin
    shard_checkpoint(folder, tmp_path / "four", 4)
    shard_checkpoint(tmp_path / "four", tmp_path / "three", 3)
    merge_checkpoint(tmp_path / "three", tmp_path / "merged")
    assert_same_bits(read_folder(tmp_path / "merged"), tensors)


def test_a_rank_needs_its_own_file_only(origin, tmp_path):
    folder, _ = origin
    shards = tmp_path / "shards"
    shard_checkpoint(folder, shards, 4)
    whole = {path.name: path.read_bytes() for path in shards.glob("*.safetensors")}
    for rank in range(4):
        for path in shards.glob("*.safetensors"):
            path.unlink()
        own = shards / f"model-tp-{rank + 1:05d}-of-00004.safetensors"
        own.write_bytes(whole[own.name])
        source = open_source(shards, rank=rank, size=4)
        assert source.shape("lm_head.weight") == (97, 20)
    for path, content in whole.items():
        (shards / path).write_bytes(content)
    _, read = load_ranks(shards, 4)
    stored = [sum(t.nbytes for t in load_file(shards / name).values()) for name in sorted(whole)]
    assert read == stored


def test_bytes_read_at_another_rank_count(origin, tmp_path):
    folder, _ = origin
    shard_checkpoint(folder, tmp_path / "shards", 4)
    assert load_ranks(tmp_path / "shards", 3)[1] == load_ranks(folder, 3)[1]


def test_raw_comes_out_as_hf(tmp_path):
    config = odd_config(vocab_size=104, dtype=torch.float16)
    tensors = random_tensors(config)
    write_raw(tmp_path / "raw", config, tensors, usable_vocab_size=97)
    merge_checkpoint(tmp_path / "raw", tmp_path / "direct")
    shard_checkpoint(tmp_path / "raw", tmp_path / "shards", 3)
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    for folder in (tmp_path / "direct", tmp_path / "merged"):
        assert_same_bits(read_folder(folder), tensors)
        fields = json.loads((folder / "config.json").read_text())
        assert (fields["model_type"], fields["vocab_size"], fields["dtype"]) == ("mamba", 104, "float16")
        assert MambaConfig.from_pretrained(folder).usable_vocab_size == 97


def test_progress_ends_at_the_total(origin, tmp_path):
    calls = []
    shard_checkpoint(origin[0], tmp_path / "shards", 2, lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2] == sum(t.nbytes for f in (tmp_path / "shards").glob("*.safetensors")
                                               for t in load_file(f).values())  # fmt: skip
    assert calls[-1][0] == "writing shards"
    calls.clear()
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged", lambda *call: calls.append(call))
    assert calls[-1] == ("merging", *2 * (sum(tensor.nbytes for tensor in origin[1].values()),))


@pytest.mark.parametrize("n", [0, -1, 31])
def test_more_ranks_than_channels(n, origin, tmp_path):
    message = f"for {n} ranks: it has 30 channels and 97 vocabulary rows, choose 1 to 30 ranks"
    with pytest.raises(CheckpointError, match=message):
        shard_checkpoint(origin[0], tmp_path / "shards", n)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("n", [8, 30, 2000])
def test_more_ranks_than_vocabulary_rows(n, tmp_path):
    config = odd_config(vocab_size=7)
    folder = write_checkpoint(tmp_path / "origin", config, random_tensors(config))
    message = f"for {n} ranks: it has 30 channels and 7 vocabulary rows, choose 1 to 7 ranks"
    with pytest.raises(CheckpointError, match=message):
        shard_checkpoint(folder, tmp_path / "shards", n)
    with pytest.raises(ValueError, match="at most 7 ranks"):  # loading has the same limit
        load_ranks(folder, 8)
    shard_checkpoint(folder, tmp_path / "shards", 7)
    load_ranks(tmp_path / "shards", 7)


def test_as_many_ranks_as_channels(origin, tmp_path):
    shard_checkpoint(origin[0], tmp_path / "shards", 30)
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    assert_same_bits(read_folder(tmp_path / "merged"), origin[1])


def test_tied_head_that_differs(tmp_path):
    config = odd_config()
    tensors = random_tensors(config) | {"lm_head.weight": torch.ones(97, 20)}
    write_checkpoint(tmp_path / "origin", config, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        shard_checkpoint(tmp_path / "origin", tmp_path / "shards", 2)


def test_full_disk_leaves_the_old_shards(origin, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shard_checkpoint(origin[0], shards, 2)
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for work in (
        lambda: shard_checkpoint(origin[0], shards, 3, overwrite=True),
        lambda: merge_checkpoint(origin[0], shards, overwrite=True),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
        try:
            with pytest.raises(CheckpointWriteError, match=f"cannot write {shards} "):
                work()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "shards"]


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestTarget:
    """No checkpoint is lost that the caller did not offer, and never the one being read."""

    @pytest.fixture(params=["shard", "merge"])
    def work(self, request):
        def shard(folder, out, **options):
            shard_checkpoint(folder, out, 2, **options)

        return shard if request.param == "shard" else merge_checkpoint

    @pytest.fixture
    def other(self, tmp_path):
        """A checkpoint of another model."""
        config = odd_config(hidden_size=12)
        return write_checkpoint(tmp_path / "other", config, random_tensors(config))

    def refuse(self, message, work, *args, **options):
        with pytest.raises(CheckpointError, match=message) as refusal:
            work(*args, **options)
        assert "\n" not in str(refusal.value)

    def test_holds_a_checkpoint(self, work, origin, other, tmp_path):
        before = content_of(other)
        message = rf"{other} holds a checkpoint already: choose another folder, or pass --overwrite \(overwrite=True\)"
        self.refuse(message, work, origin[0], other)
        assert content_of(other) == before
        self.refuse(message, work, "no/such-name", other)  # before anything is looked for
        work(origin[0], other, overwrite=True)
        models, _ = load_ranks(other, 2)
        wide = {name: tensor.float() for name, tensor in origin[1].items()}
        assert_same_bits(merged(models), wide)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "other"]

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("made", ["full", "shards"])
    def test_is_the_input(self, work, made, overwrite, origin, tmp_path, monkeypatch):
        folder = origin[0]
        if made == "shards":
            folder = tmp_path / "shards"
            shard_checkpoint(origin[0], folder, 4)
        before = content_of(folder)
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(tmp_path)
        for out in (folder, f"{folder}/.", tmp_path / "link", folder.name):
            self.refuse(f"{folder} holds the checkpoint to be read", work, folder, out, overwrite=overwrite)
        self.refuse("holds the checkpoint to be read", work, tmp_path / "link", folder, overwrite=overwrite)
        assert content_of(folder) == before

    def test_is_what_the_name_stands_for(self, work, origin, monkeypatch):
        monkeypatch.setattr("tp_mamba.checkpoint.shards.resolve", lambda name: origin[0])
        self.refuse("holds the checkpoint to be read", work, "hub/name", origin[0], overwrite=True)

    def test_holds_the_input(self, work, origin, tmp_path):
        outer = write_checkpoint(tmp_path / "outer", odd_config(), random_tensors(odd_config()))
        inner = origin[0].rename(outer / "inner")
        self.refuse(f"{outer} holds the checkpoint to be read", work, inner, outer, overwrite=True)
        assert (inner / "config.json").is_file()

    def test_holds_the_files_the_input_links_to(self, work, other, tmp_path):
        (tmp_path / "links").mkdir()
        for path in other.iterdir():
            (tmp_path / "links" / path.name).symlink_to(path)
        before = content_of(other)
        self.refuse(
            f"{other} holds the checkpoint to be read", work, tmp_path / "links", other, overwrite=True
        )
        assert content_of(other) == before

    def test_is_the_input_of_links(self, work, origin, tmp_path):
        """As a folder of the hub's cache is: every file lies elsewhere."""
        links = tmp_path / "links"
        links.mkdir()
        for path in origin[0].iterdir():
            (links / path.name).symlink_to(path)
        self.refuse(f"{links} holds the checkpoint to be read", work, links, links, overwrite=True)

    def test_lies_in_the_input(self, work, origin):
        """Which is left alone, twice: the second time a folder stands in it."""
        before = content_of(origin[0])
        for overwrite in (False, True):
            work(origin[0], origin[0] / "made", overwrite=overwrite)
        models, _ = load_ranks(origin[0] / "made", 2)
        assert_same_bits(merged(models), {name: tensor.float() for name, tensor in origin[1].items()})
        assert {name: (origin[0] / name).read_bytes() for name in before} == before

    def test_empty_folder_is_free(self, work, origin, tmp_path):
        (tmp_path / "empty").mkdir()
        work(origin[0], tmp_path / "empty")
        assert MambaConfig.from_pretrained(tmp_path / "empty") == MambaConfig.from_pretrained(origin[0])
