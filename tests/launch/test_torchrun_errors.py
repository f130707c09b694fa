"""Under plain torchrun a failure is told once, by the rank that has something to tell."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tp_mamba.launch.ranks import failures
from tp_mamba.launch.ranks.failures import RankFailure, is_teller, sigterm_sentence

HERE = Path(__file__).parent
OWN = "tp-mamba generate: error: rank 1: the weights of this rank are bad"
ENDED = f"tp-mamba generate: error: {sigterm_sentence(0)}"
LOST = (
    "tp-mamba generate: error: rank 0 lost contact with another rank, which ended before its work was done; "
    "see that rank's error"
)


@pytest.mark.parametrize(
    ("place", "fault", "told"),
    [
        ("loading", "raise", [OWN]),
        ("generating", "hang up", [LOST]),
        ("generating", "kill unnoticed", [ENDED]),
        # torchrun looks every tenth of a second; the connection breaks at once, but this rank needs a processor to
        # see it. Whoever is first, one sentence is told.
        ("generating", "kill", [LOST, ENDED]),
    ],
)
def test_a_rank_that_ends(place: str, fault: str, told: list[str], sample: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "faulty_command.py"), "1", place, fault]
    command += ["generate", str(sample), "--prompt", "The", "--device", "cpu", "--ignore-eos"]
    # The script's own folder has to be on its path.
    environment = {**os.environ, "PYTHONSAFEPATH": "", "FAULT_TIME": str(tmp_path / "time")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, env=environment, cwd=tmp_path
    )
    assert done.returncode == 1
    assert time.time() - float((tmp_path / "time").read_text()) < 25  # torchrun kills after 30
    lines = [line for line in done.stderr.splitlines() if "tp-mamba generate" in line]
    assert lines in [[sentence] for sentence in told]
    # Nothing of ours but the sentence: the one trace is torchrun's, and ends in its report.
    assert "pair.cc" not in done.stderr
    assert "rank 1 of 2 failed" not in done.stderr
    assert "launch/cli.py" not in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert done.stdout == "" or done.stdout.endswith("\n")


def failure_of(rank: int, error: str = "ValueError") -> RankFailure:
    consequence = error != "ValueError"
    return RankFailure(rank=rank, error=error, sentence="bad", consequence=consequence)


@pytest.fixture
def join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``join(rank, joined)``: be that rank of torchrun's, in the process group or not yet."""
    monkeypatch.setattr(failures, "GRACE_S", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "3")

    def as_rank(rank: int, joined: bool = True) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        monkeypatch.setattr(failures, "in_process_group", lambda: joined)

    return as_rank


def test_the_first_with_an_error_of_its_own_tells(join) -> None:
    join(1)
    assert is_teller(failure_of(1))
    join(2)
    assert not is_teller(failure_of(2))
    join(0)
    assert not is_teller(failure_of(0, "RankFailedError"))
    assert not is_teller(failure_of(0, "RuntimeError"))


def test_word_of_a_failure_is_told_if_nobody_else_does(join) -> None:
    join(0)
    start = time.monotonic()
    assert is_teller(failure_of(0, "RankFailedError"))
    assert time.monotonic() - start > 0.15  # the rank on another host has had its time


def test_before_the_ranks_have_joined_rank_0_is_let_first(join, monkeypatch: pytest.MonkeyPatch) -> None:
    join(0, joined=False)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("rank 0 waits for nobody"))
        assert is_teller(failure_of(0))
    join(1, joined=False)
    assert not is_teller(failure_of(1))


def test_another_launcher_gives_no_folder(join, monkeypatch: pytest.MonkeyPatch) -> None:
    join(1)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert is_teller(failure_of(1))
    assert not is_teller(failure_of(1, "RuntimeError"))
    assert is_teller(failure_of(0, "RuntimeError"))


def test_a_process_on_its_own_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_teller(failure_of(0))


@pytest.mark.parametrize("debug", [False, True])
def test_torchruns_report_has_the_stack_if_asked(
    debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    try:
        raise ValueError("the reason")
    except ValueError as error:
        failures.leave_for_torchrun(RankFailure.of(error, 1), debug=debug)
    observed = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    report = ChildFailedError("command", {1: observed}).format_msg()
    assert "the reason" in report
    assert ("Traceback" in report) is debug
