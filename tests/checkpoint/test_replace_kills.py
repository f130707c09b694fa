"""A writer that is killed at any step leaves the old folder or the new one, and a later run clears up after it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_samples import odd_config, random_tensors, write_checkpoint

from tp_mamba.checkpoint import atomic
from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.leftovers import LeftoverWarning, recover, workplace
from tp_mamba.checkpoint.replace import refuse_taken, replacing
from tp_mamba.checkpoint.shards import shard_checkpoint

SCRIPT = Path(__file__).with_name("writer_kills.py")


@pytest.fixture(params=["exchange", "renames"])
def kills(request, tmp_path):
    command = [sys.executable, "-P", SCRIPT, tmp_path, request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_every_step(kills):
    way, reports = kills
    killed, last = reports[:-1], reports[-1]
    assert len(killed) > 10
    assert (last["status"], last["found"], last["told"]) == (0, "new", [])
    for report in reports:
        assert report["recovered"] in ("old", "new"), report
        assert report["names"] == ["target"], report  # nothing hidden stays
        # Between two renames there is nothing, but recover() puts the old one back; an exchange has no between.
        assert report["found"] in ("old", "new", *(["nothing"] if way == "renames" else [])), report
    assert any("removed" in sentence for report in killed for sentence in report["told"])
    gone = [report for report in killed if report["found"] == "nothing"]
    assert bool(gone) == (way == "renames")
    for report in gone:
        assert report["recovered"] == "old"
        assert any(sentence.startswith("put back ") for sentence in report["told"])
    # The later the kill, the later the state: never old again once it was new.
    assert [r["recovered"] for r in reports] == sorted((r["recovered"] for r in reports), reverse=True)


HOLD = """
import sys
from pathlib import Path
from tp_mamba.checkpoint.leftovers import workplace
with workplace(Path(sys.argv[1])) as (new, old):
    new.mkdir()
    (new / "config.json").write_text("being written")
    print(new, flush=True)
    sys.stdin.read()
"""


def test_a_living_writer_is_left_alone_and_a_dead_one_is_not(tmp_path):
    target = tmp_path / "target"
    command = [sys.executable, "-P", "-c", HOLD, target]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        new = Path(writer.stdout.readline().strip())
        recover(target)
        with replacing(target) as mine:
            (mine / "config.json").write_text("{}")
        assert (new / "config.json").read_text() == "being written"
        writer.kill()
        writer.wait()
    with pytest.warns(LeftoverWarning, match=f"removed {new}, which a killed writer had left"):
        refuse_taken(target, tmp_path / "origin", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


KILLED_SHARD = """
import os, signal, sys
from tp_mamba.checkpoint.shards import shard_checkpoint
def progress(what, done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
shard_checkpoint(sys.argv[1], sys.argv[2], 2, progress, overwrite=True)
"""


def test_shard_killed_half_way(tmp_path):
    """With real weights: the older folder stays, and the next run removes the hidden half of a copy."""
    config = odd_config()
    origin = write_checkpoint(tmp_path / "origin", config, random_tensors(config))
    shards = tmp_path / "shards"
    shard_checkpoint(origin, shards, 3)
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED_SHARD, origin, shards], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    (hidden,) = tmp_path.glob(".shards.*.new")
    assert list(hidden.glob("*.safetensors"))
    with (
        pytest.raises(CheckpointError, match="holds a checkpoint already"),
        pytest.warns(LeftoverWarning, match=f"removed {hidden}"),
    ):
        shard_checkpoint(origin, shards, 2)
    shard_checkpoint(origin, shards, 2, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "shards"]


def test_leftovers_without_a_lock_are_of_a_dead_writer(tmp_path):
    """As versions without locks left them."""
    for kind in ("new", "old"):
        (tmp_path / f".target.0123abcd.{kind}").mkdir()
        (tmp_path / f".target.0123abcd.{kind}" / "config.json").write_text(kind)
    (tmp_path / ".target.backup").mkdir()  # not ours
    with pytest.warns(LeftoverWarning) as told:
        recover(tmp_path / "target")
    assert [str(warning.message).split()[0] for warning in told] == ["put", "removed"]
    assert (tmp_path / "target" / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.backup", "target"]


def test_where_the_file_system_has_no_locks_nothing_is_removed(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".target.0123abcd.new").mkdir()
    (tmp_path / ".target.0123abcd.lock").touch()
    with replacing(tmp_path / "target") as new:
        (new / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".target.0123abcd.lock",
        ".target.0123abcd.new",
        "target",
    ]


def test_the_only_copy_is_never_removed(tmp_path, monkeypatch):
    """Two renames, of which the second fails, and the way back too."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("old")
    monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
    rename = Path.rename

    def stuck(self, to):
        if to.name == "target":
            raise OSError(30, "Read-only file system")
        return rename(self, to)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", stuck)
        with pytest.raises(OSError, match="Read-only"), replacing(tmp_path / "target") as new:
            (new / "config.json").write_text("new")
    with pytest.warns(LeftoverWarning, match="put back"):
        recover(tmp_path / "target")
    assert (tmp_path / "target" / "config.json").read_text() == "old"


class TestFile:
    def test_replaced_whole(self, tmp_path):
        path = tmp_path / "state"
        path.write_text("old")
        with atomic.replacing_file(path) as new:
            new.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert os.listdir(tmp_path) == ["state"]

    def test_failure_leaves_the_old_one(self, tmp_path):
        path = tmp_path / "state"
        path.write_text("old")

        def interrupted():
            with atomic.replacing_file(path) as new:
                new.write_text("half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["state"]

    def test_flushed_before_the_rename(self, tmp_path, monkeypatch):
        """And the folder after it: a power cut must not leave a name without its data."""
        done = []
        sync, replace = atomic.sync, os.replace
        monkeypatch.setattr(atomic, "sync", lambda path: (done.append(path.suffix), sync(path)))
        monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
        with atomic.replacing_file(tmp_path / "state") as new:
            new.write_text("new")
        assert done == [".new", "replace", tmp_path.suffix]

    def test_a_killed_writers_file_is_removed(self, tmp_path):
        (tmp_path / ".state.0123abcd.new").write_text("half")
        with pytest.warns(LeftoverWarning), atomic.replacing_file(tmp_path / "state") as new:
            new.write_text("new")
        assert os.listdir(tmp_path) == ["state"]


def test_every_file_of_a_folder_is_flushed_before_it_is_put_in_place(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(atomic, "sync", lambda path: flushed.append(path.name))
    with workplace(tmp_path / "target") as (new, old):
        new.mkdir()
        for name in ("a", "b"):
            (new / name).touch()
        atomic.put_in_place(new, tmp_path / "target", old)
    assert flushed == ["a", "b", new.name, tmp_path.name]
