"""What SIGINT and SIGTERM do to a process that imports, starts ranks, or is one of torchrun's.

A signal that was ignored when this process started (``nohup``, a background job of a script) stays ignored, here
and in every rank.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that ask a launcher to stop."""


class StoppedError(RuntimeError):
    """A signal told the launcher to stop; ``signum`` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any], *signals: signal.Signals) -> Iterator[None]:
    """Inside, ``handler`` serves those of ``signals`` that are not ignored. Only the main thread may set one."""
    main = threading.current_thread() is threading.main_thread()
    heard = [number for number in signals if main and signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def ending_at_once() -> Any:
    """Inside, SIGINT ends this process with status 130 there and then. For imports: nothing is cleaned up.

    A KeyboardInterrupt in the middle of an import is swallowed by whoever tries an import, and what is half
    imported then fails in words of its own.
    """
    return handled(lambda *_: os._exit(128 + signal.SIGINT), signal.SIGINT)


def raising_stopped() -> Any:
    """Inside, a signal that asks this process to stop raises :class:`StoppedError`."""

    def stop(signum: int, _: FrameType | None) -> None:
        raise StoppedError(signum)

    return handled(stop, *STOPPING)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started inside never hear SIGINT; this one hears it when the block ends.

    A terminal sends it to every process of a job. A child would print a stack trace, the earlier the longer:
    whoever started it ends it. It inherits the mask of the thread that starts it.
    """
    resource_tracker.ensure_running()  # it lifts the mask when it starts, so it must have started before
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def on_sigterm(last_words: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM makes a thread of its own call ``last_words``, and ends this process with status 143.

    When one rank ends, torchrun sends SIGTERM to the others. That may come before they notice a lost connection,
    and one that waits inside an NCCL kernel may not notice for long. Python runs a handler only between two
    lines of the main thread, which may wait inside a collective for ever; but the number of the signal is
    written to a pipe at once, where a thread reads it.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set a handler
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGTERM in numbers:
                try:
                    last_words()
                finally:
                    os._exit(128 + signal.SIGTERM)

    listener = threading.Thread(target=listen, name="listens for SIGTERM", daemon=True)
    listener.start()
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        with handled(lambda *_: None, signal.SIGTERM):
            yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        listener.join()  # it has read what came before
        os.close(reader)
