"""Starting ranks: results, the first error when one ends, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import rank_jobs
import torch
from process_groups import wait_until_empty

from tp_mamba.launch.ranks.failures import LaunchError
from tp_mamba.launch.ranks.start import check_device, start_ranks

HERE = Path(__file__).parent


def test_result_of_rank_0_comes_back_and_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert start_ranks(rank_jobs.add_ranks, 5, size=2) == (2, 5.0 + 6.0, max(1, cores // 2))


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


SLEEPERS = f"""
import sys; sys.path.append({str(HERE)!r})
import rank_jobs
from tp_mamba.launch.ranks.signals import StoppedError
from tp_mamba.launch.ranks.start import start_ranks
try:
    start_ranks(rank_jobs.sleep_for_ever, size=2)
except StoppedError as stopped:
    sys.exit(100 + stopped.signum)
"""


@contextmanager
def sleepers(before: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A launcher whose two ranks sleep, in a process group of its own; ``before`` is what it does first."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", before + SLEEPERS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        try:
            assert [parent.stdout.readline() for _ in range(2)] == [b"started\n"] * 2
            yield parent
        except BaseException:
            os.killpg(parent.pid, signal.SIGKILL)  # leaving the block waits for the parent
            raise


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_rank(signum: signal.Signals) -> None:
    with sleepers() as parent:
        os.killpg(parent.pid, signum)  # the whole foreground group, as a terminal does on Ctrl-C
        _, err = parent.communicate(timeout=300)
    assert parent.returncode == 100 + signum
    assert err == b""
    wait_until_empty(parent.pid)


def test_ignored_signals_end_no_rank() -> None:
    # As nohup, and a shell for its background jobs, hand them down.
    ignore = "import signal\nfor s in (signal.SIGINT, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\n"
    with sleepers(ignore) as parent:
        os.killpg(parent.pid, signal.SIGINT)
        os.killpg(parent.pid, signal.SIGHUP)
        os.killpg(parent.pid, signal.SIGTERM)  # delivered after those that came before
        _, err = parent.communicate(timeout=300)
    assert parent.returncode == 100 + signal.SIGTERM
    assert err == b""
    wait_until_empty(parent.pid)


def test_a_launcher_that_is_killed_takes_its_ranks_along() -> None:
    with sleepers() as parent:
        parent.kill()
        parent.communicate(timeout=300)
    wait_until_empty(parent.pid)


@pytest.mark.parametrize(
    ("gpus", "ranks", "refused"), [(0, 4, False), (2, 2, False), (2, 4, True), (1, 2, True)]
)
def test_too_few_gpus_are_no_reason_for_a_cpu(
    gpus: int, ranks: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for device, backend in ((None, None), ("cuda", None), (None, "nccl")):
        asked_for_a_gpu = device is not None or backend is not None
        if refused:
            with pytest.raises(
                ValueError, match=rf"^--tp {ranks} on a host with {gpus} GPUs?, and each rank"
            ):
                check_device(device, backend, ranks)
        elif asked_for_a_gpu and not gpus:
            with pytest.raises(ValueError, match="on a host where torch finds no GPU"):
                check_device(device, backend, ranks)
        else:
            check_device(device, backend, ranks)
    check_device("cpu", None, ranks)
    check_device(None, "gloo", ranks)
