"""Ctrl-C while this process imports, and while ranks start: silence, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from process_groups import wait_until_empty

from tp_mamba.launch.ranks import signals

HERE = Path(__file__).parent

INTERRUPTED_IMPORT = """
import os, signal, sys
from tp_mamba.launch import cli

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sys.stdout.write("")  # a line on which Python may run the handler
            except KeyboardInterrupt:
                raise ImportError("as code that tries an import does with everything")

sys.meta_path.insert(0, Finder)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "argv", [("generate", "--prompt", "x", "--tp", "2"), ("info",), ("plan", "--tp", "2")]
)
def test_ctrl_c_in_the_middle_of_an_import(argv: tuple[str, ...], tmp_path: Path) -> None:
    verb, *rest = argv
    command = [sys.executable, "-P", "-c", INTERRUPTED_IMPORT, verb, str(tmp_path), *rest]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_while_ranks_start(to_all: bool) -> None:
    with subprocess.Popen(
        [sys.executable, HERE / "slow_start.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONSAFEPATH": ""},  # the script's own folder has to be on its path
    ) as parent:
        assert parent.stdout is not None
        try:
            assert [parent.stdout.readline() for _ in range(2)] == [b"starting\n"] * 2
            # A terminal sends it to the whole foreground group; a supervisor may tell the launcher alone.
            (os.killpg if to_all else os.kill)(parent.pid, signal.SIGINT)
            out, err = parent.communicate(timeout=60)  # the launcher gives the ranks 30 of them
        except BaseException:
            os.killpg(parent.pid, signal.SIGKILL)  # leaving the block waits for the parent
            raise
    assert (parent.returncode, out, err) == (130, b"", b"")
    wait_until_empty(parent.pid)


def test_children_start_with_the_signal_blocked_and_this_process_hears_it() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_while_children_start()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def interrupt_while_children_start() -> None:
    """SIGINT to this process inside the block: it comes through at its end."""
    with signals.kept_from_children():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        inside = signal.sigpending()
    assert signal.SIGINT in inside


def test_what_is_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.raising_stopped(), signals.ending_at_once():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, previous)


def test_the_handler_from_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with signals.ending_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    inside = []
    thread = threading.Thread(target=lambda: inside.append(enter()))
    thread.start()
    thread.join()
    assert inside == [before]


def enter() -> object:
    """SIGINT's handler inside the block."""
    with signals.ending_at_once():
        return signal.getsignal(signal.SIGINT)
