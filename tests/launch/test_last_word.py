"""SIGTERM to one of torchrun's ranks: one sentence from one rank, at once, whatever its main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tp_mamba.launch.ranks.failures import Teller, sigterm_sentence

RANK_THAT_IS_ENDED = """
import ctypes, os, signal, sys, time
from tp_mamba.launch import cli
from tp_mamba.launch.console import write
from tp_mamba.launch.ranks import failures

def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)

def wait_in_c():
    # As in a collective: no handler of Python's runs. A sleep or a lock of its own would run it.
    mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)

def in_its_work(args):
    write("The sea")
    sigterm()
    wait_in_c()

def between_claim_and_sentence(args):
    is_teller = failures.is_teller
    def interrupted(failure):
        tells = is_teller(failure)
        sigterm()
        time.sleep(0.5)
        return tells
    failures.is_teller = interrupted
    raise ValueError("its own error")

def after_its_sentence(args):
    def leave():
        sigterm()
        wait_in_c()
    cli.leave_in_time = leave
    raise ValueError("its own error")

cli.run_verb = globals()[sys.argv[1]]
sys.exit(cli.main(["verify", "a checkpoint"]))
"""
ENDED = f"tp-mamba verify: error: {sigterm_sentence(0)}\n"
OWN = "tp-mamba verify: error: its own error\n"


def end(work: str, rank: int | None, error_file: Path | None) -> subprocess.CompletedProcess[str]:
    """Run the program above with ``work`` for the verb's, as rank ``rank`` of torchrun's or of another launcher's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    if rank is not None:
        environment |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    if error_file is not None:
        error_file.parent.mkdir()
        environment["TORCHELASTIC_ERROR_FILE"] = str(error_file)
    command = [sys.executable, "-P", "-c", RANK_THAT_IS_ENDED, work]
    # torchrun kills after 30 seconds.
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=25)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        ("in_its_work", ENDED),
        ("between_claim_and_sentence", OWN),
        ("after_its_sentence", OWN),
    ],
)
@pytest.mark.parametrize("launcher", ["torchrun", "another"])
def test_a_rank_that_is_ended_tells_once(work: str, told: str, launcher: str, tmp_path: Path) -> None:
    error_file = tmp_path / "0" / "error.json" if launcher == "torchrun" else None
    done = end(work, 0, error_file)
    assert (done.returncode, done.stderr) == (143, told)
    assert done.stdout == ("The sea\n" if work == "in_its_work" else "")  # the sentence has a line of its own


def test_what_has_been_told_is_not_told_again(tmp_path: Path) -> None:
    assert end("in_its_work", 0, tmp_path / "0" / "error.json").stderr == ENDED
    done = end("in_its_work", 1, tmp_path / "1" / "error.json")
    assert (done.returncode, done.stdout, done.stderr) == (143, "The sea\n", "")


def test_without_torchruns_folder_rank_0_tells() -> None:
    done = end("in_its_work", 1, None)
    assert (done.returncode, done.stderr) == (143, "")


def test_a_process_on_its_own_ends_as_ever() -> None:
    done = end("in_its_work", None, None)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "The sea", "")


def test_ctrl_c_is_still_an_interrupt_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    threads, before = set(threading.enumerate()), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        interrupt_inside()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert set(threading.enumerate()) == threads


def interrupt_inside() -> None:
    """Ctrl-C while SIGTERM is listened for."""
    with Teller("verify").ended_with_a_word():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)


def test_another_thread_than_the_main_one_sets_no_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    inside = []

    def enter() -> None:
        with Teller("verify").ended_with_a_word():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [signal.getsignal(signal.SIGTERM)]
