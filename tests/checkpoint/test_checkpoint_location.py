"""A folder, a hub name that is there, and one that is not."""

import socket
import time

import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import IncompleteSnapshotError

from tp_mamba.checkpoint import location
from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.leftovers import LeftoverWarning, workplace
from tp_mamba.checkpoint.location import fetch, resolve


def refuse(name, message, **options):
    with pytest.raises(CheckpointError, match=message) as refusal:
        resolve(name, **options)
    assert "\n" not in str(refusal.value)


def test_folder(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


def test_file_and_missing_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    refuse(
        tmp_path / "model.safetensors",
        "is a file, and the folder that holds it is wanted: give a checkpoint folder",
    )
    refuse(tmp_path / "nowhere", "does not exist: give a checkpoint folder")
    refuse("./nowhere/at/all", "does not exist: give a checkpoint folder")


def fake_hub(monkeypatch, folder, files):
    """snapshot_download that 'downloads' those of ``files`` that match."""
    from fnmatch import fnmatch

    calls = []

    def download(name, *, allow_patterns, local_files_only):
        assert not local_files_only
        calls.append(name)
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (folder / file).touch()
        return str(folder)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(location, "model_info", lambda name, *, timeout: None)
    monkeypatch.setattr(location, "snapshot_download", download)
    return calls


REPOSITORY = [
    "config.json",
    "tokenizer.json",
    "README.md",
    "pytorch_model.bin",
    "tf_model.h5",
    "consolidated.pth",
]


def test_download_prefers_safetensors(tmp_path, monkeypatch):
    fake_hub(monkeypatch, tmp_path, [*REPOSITORY, "model.safetensors"])
    assert resolve("owner/name") == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_download_of_bin_files(tmp_path, monkeypatch):
    fake_hub(monkeypatch, tmp_path, REPOSITORY)
    resolve("owner/name")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "pytorch_model.bin",
        "tokenizer.json",
    ]


def test_download_of_the_config_only(tmp_path, monkeypatch):
    calls = fake_hub(monkeypatch, tmp_path, [*REPOSITORY, "model.safetensors"])
    resolve("owner/name", config_only=True)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert calls == ["owner/name"]


def test_offline_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refuse(
        "owner/no-such-model",
        "owner/no-such-model is no folder here .* HF_HUB_OFFLINE is set: unset it, or give a checkpoint folder",
    )


class TestEarlierDownload:
    """What huggingface_hub itself keeps: a snapshot, and (from 1.22) the listing of the whole repository."""

    @pytest.fixture
    def snapshot(self, monkeypatch, tmp_path):
        from huggingface_hub import _tree_cache

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        storage, commit = tmp_path / "models--owner--name", "0" * 40
        snapshot = storage / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (storage / "refs").mkdir()
        (storage / "refs" / "main").write_text(commit)
        files = (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "README.md",
        )
        entry = _tree_cache.TreeCacheEntry(
            size=2, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None
        )
        _tree_cache.write_tree_cache(str(storage), commit, dict.fromkeys(files, entry))
        for name in files[:3]:
            (snapshot / name).write_text("{}")
        return snapshot

    def test_without_files_that_nothing_needs(self, snapshot):
        with pytest.raises(IncompleteSnapshotError):
            snapshot_download("owner/name", allow_patterns=["vocab.json"])
        assert resolve("owner/name") == snapshot
        assert resolve("owner/name", config_only=True) == snapshot
        assert fetch("owner/name", ("tokenizer.json", "vocab.json"), remedy="") == snapshot

    def test_without_network(self, snapshot, monkeypatch):
        def fail(*args, **options):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(location, "model_info", fail)
        assert resolve("owner/name") == snapshot
        (snapshot / "config.json").unlink()
        refuse(
            "owner/name",
            r"owner/name was downloaded without config\.json or .* and could not be downloaded .*\(no route to host\)",
        )

    def test_without_what_is_needed(self, snapshot):
        (snapshot / "model.safetensors").unlink()
        refuse(
            "owner/name",
            r"owner/name was downloaded without model\.safetensors or .*, and HF_HUB_OFFLINE is set",
        )
        assert resolve("owner/name", config_only=True) == snapshot
        (snapshot / "config.json").unlink()
        refuse("owner/name", r"owner/name was downloaded without config\.json", config_only=True)

    def test_that_cannot_be_read_says_why(self, snapshot, monkeypatch):
        def fail(*args, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(location, "snapshot_download", fail)
        refuse("owner/name", "its download cannot be read .*Permission denied.*, and HF_HUB_OFFLINE is set")


def test_adapter_on_the_hub_is_noticed(tmp_path, monkeypatch):
    fake_hub(monkeypatch, tmp_path, [*REPOSITORY, "model.safetensors", "adapter_config.json"])
    refuse("owner/name", "holds an adapter beside the model", config_only=True)
    refuse("owner/name", "holds an adapter beside the model")


def test_folder_that_a_killed_writer_moved_away(tmp_path):
    (tmp_path / ".model.0123abcd.old").mkdir()
    with pytest.warns(LeftoverWarning, match=f"put back {tmp_path / 'model'}"):
        assert resolve(tmp_path / "model") == tmp_path / "model"


def test_what_killed_writers_left_beside_a_folder_is_named(tmp_path, recwarn):
    for name in ("model", ".model.0123abcd.new", ".model.4567abcd.old", ".other.0123abcd.new"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.0123abcd.lock").touch()
    with workplace(tmp_path / "model") as (new, _):  # this writer lives
        new.mkdir()
        resolve(tmp_path / "model")
        assert sorted(str(warning.message).partition(" was left")[0] for warning in recwarn) == [
            f"{tmp_path}/.model.0123abcd.new",
            f"{tmp_path}/.model.4567abcd.old",
        ]
    assert len(list(tmp_path.iterdir())) == 5  # a reader removes nothing


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\x1b[2J", "~nobody-here/x", "\ud800"])
def test_odd_names(name):
    with pytest.raises(CheckpointError, match="does not exist: give a checkpoint folder") as refusal:
        resolve(name)
    assert str(refusal.value).isprintable()


def test_network_failure_is_one_sentence(monkeypatch, tmp_path):
    def fail(*args, **options):
        raise ConnectionError("no route to host\nwith a second line")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(location, "model_info", fail)
    refuse(
        "owner/name",
        r"owner/name is no folder here and could not be downloaded .*\(no route to host\): check",
    )


def test_hub_that_never_answers_does_not_hang(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(location, "_HUB_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(location, "model_info", api.model_info)
        began = time.monotonic()
        refuse("owner/name", "could not be downloaded from the Hugging Face hub")
        assert time.monotonic() - began < 10
