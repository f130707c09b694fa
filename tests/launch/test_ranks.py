"""Starting ranks through torchrun's launcher: results, and the first error when one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_jobs
from process_groups import wait_until_empty

from tp_mamba.launch.ranks.failures import LaunchError
from tp_mamba.launch.ranks.start import start_ranks

HERE = Path(__file__).parent


def test_result_of_rank_0_comes_back() -> None:
    assert start_ranks(rank_jobs.add_ranks, 5, size=3) == (3, 5.0 + 6.0 + 7.0)


def test_ranks_of_a_host_share_its_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert start_ranks(rank_jobs.count_threads, size=2) == max(1, cores // 2)


def test_a_process_on_its_own_keeps_its_threads(one_thread: None) -> None:
    assert rank_jobs.count_threads() == 1


@pytest.mark.parametrize(
    ("fault", "victim", "sentence"),
    [
        ("raise", 1, "the weights of this rank are bad"),
        ("kill", 1, "rank 1 was killed by SIGKILL; the other ranks have been ended"),
        ("exit", 1, "rank 1 exited with status 7 before its work was done"),
        ("leave", 1, "rank 1 exited with status 0 before its work was done"),
    ],
)
def test_first_error_is_reported_and_the_others_end(
    fault: str,
    victim: int,
    sentence: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("FAULT_TIME", str(tmp_path / "time"))
    with pytest.raises(LaunchError) as raised:
        start_ranks(rank_jobs.reduce_for_ever, victim, fault, 3, size=2)
    assert time.time() - float((tmp_path / "time").read_text()) < 30
    assert str(raised.value) == sentence
    out, err = capfd.readouterr()
    assert out + err == ""  # no banner, no trace of the launcher's or of another rank


def test_error_before_the_group_exists() -> None:
    with pytest.raises(LaunchError, match=r"^no such checkpoint$"):
        start_ranks(rank_jobs.fail_while_others_wait, 1, size=2)


def test_first_of_several_errors_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAULT_TIME", str(tmp_path / "raised"))
    with pytest.raises(LaunchError, match=r"^error of rank 1$"):
        start_ranks(rank_jobs.all_raise, 0, size=2)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_rank(signum: signal.Signals) -> None:
    code = (
        f"import sys; sys.path.append({str(HERE)!r})\n"
        "import rank_jobs\n"
        "from tp_mamba.launch.ranks.signals import StoppedError\n"
        "from tp_mamba.launch.ranks.start import start_ranks\n"
        "try:\n"
        "    start_ranks(rank_jobs.sleep_for_ever, size=2)\n"
        "except StoppedError as stopped:\n"
        "    sys.exit(100 + stopped.signum)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        try:
            assert [parent.stdout.readline() for _ in range(2)] == [b"started\n"] * 2
            # The whole foreground group, as a terminal does on Ctrl-C.
            os.killpg(parent.pid, signum)
            _, err = parent.communicate(timeout=60)  # the launcher gives the ranks 30 of them
        except BaseException:
            os.killpg(parent.pid, signal.SIGKILL)  # leaving the block waits for the parent
            raise
    assert parent.returncode == 100 + signum
    assert err == b""
    wait_until_empty(parent.pid)
