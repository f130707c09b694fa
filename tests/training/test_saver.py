"""Checkpoints of a run: whole or not there, wherever a process is killed, and what a full disk does."""

import errno
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from training_samples import trainer

from tp_mamba.checkpoint.errors import CheckpointWriteError
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.training import saver
from tp_mamba.training.saver import SaveWarning, hold_run, steps_in

TP = TensorParallel(device="cpu")
KILLS = 4


def test_killed_anywhere_a_run_goes_on_to_the_same_loss(tmp_path):
    command = [sys.executable, "-P", Path(__file__).with_name("training_kills.py"), tmp_path, str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len({kill["at"] for kill in report["killed"]}) == KILLS
    for kill in report["killed"]:
        done_before = kill["steps"][-1] if kill["steps"] else 0
        assert kill["losses"] == report["losses"][done_before:], kill
        assert kill["left"] == [".lock", "metrics.jsonl", "step-00000005", "step-00000006"], kill
    # The later the kill, the more was done before it.
    firsts = [max(kill["steps"], default=0) for kill in report["killed"]]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) > KILLS // 2  # they fell at different steps of training


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    run = trainer(TP, tmp_path, save_every=2)
    write = saver.write_tensors

    def full(folder, tensors, ranks):
        if "step-00000004" in folder.name:
            folder.mkdir()
            (folder / "half").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, tensors, ranks)

    monkeypatch.setattr(saver, "write_tensors", full)
    sentence = r"checkpoint of step 4 cannot .*No space left on device\), the last good one is step-00000002.*--resume"
    with pytest.raises(CheckpointWriteError, match=sentence):
        run.fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "step-00000002"]


def test_a_write_that_fails_beside_another_error_hides_nothing(tmp_path, monkeypatch):
    run = trainer(TP, tmp_path, save_every=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def stop(step, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saver, "write_tensors", full)
    with pytest.raises(KeyboardInterrupt), pytest.warns(SaveWarning, match="there is none before it"):
        run.fit(stop)


def test_a_run_is_one_process_s(tmp_path):
    lock = hold_run(tmp_path / "run")
    (tmp_path / "run" / "step-00000003.partial").mkdir()
    with pytest.raises(ValueError, match="another process trains into"):
        hold_run(tmp_path / "run")
    assert (tmp_path / "run" / "step-00000003.partial").is_dir()
    saver.os.close(lock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saver.os.close(hold_run(tmp_path / "run"))
    assert not (tmp_path / "run" / "step-00000003.partial").exists()
    assert steps_in(tmp_path / "run") == []
