"""What Ctrl-C does while this process imports or starts others: it ends them without a word.

A KeyboardInterrupt in the middle of an import is swallowed by whoever tries an import, and what is half
imported then fails in words of its own; one in a process that is only just starting prints a stack trace.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children, resource_tracker

STATUS = 128 + signal.SIGINT


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside, SIGINT ends this process with status 130 there and then. For imports: nothing is cleaned up."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: os._exit(STATUS))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that this thread starts inside have SIGINT blocked until :func:`accept`; this one hears it.

    A process inherits the mask of the thread that starts it, and Python's own handler comes with the
    interpreter, before any line of ours. Children left over when the block is left by an exception are killed:
    nobody knows of them who could end them.
    """
    # It lifts the mask when it starts, which must have happened before.
    resource_tracker.ensure_running()
    others, done = set(active_children()), threading.Event()
    # The system hands a signal to any thread that does not block it, and Python runs the handler in the main one.
    listener = threading.Thread(target=done.wait, name="listens for SIGINT", daemon=True)
    listener.start()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    except BaseException:
        for child in set(active_children()) - others:
            child.kill()
            child.join()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        done.set()
        listener.join()


def accept() -> None:
    """From here on SIGINT ends this process at once, even inside a collective, where Python handles no signal.

    One that has come since the process was started counts as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
