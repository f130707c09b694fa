"""SIGTERM to one of torchrun's ranks: the rank says what ended it, unless that has been told, and is gone.

When one rank ends, torchrun sends SIGTERM to the others. That may come before they notice a lost connection,
and one that waits inside an NCCL kernel may not notice for long: without a word here, nobody would tell anything.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tp_mamba.launch.environment import under_torchrun
from tp_mamba.launch.failures import sigterm_sentence
from tp_mamba.launch.output import end_line
from tp_mamba.launch.telling import is_teller_at_once, tell

STATUS = 128 + signal.SIGTERM


class LastWord:
    """What this rank says before it ends, once: the error that it met, or that SIGTERM ended it."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._turn = threading.Lock()
        self._taken = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the caller tells an error of this rank's; SIGTERM waits for that, and then ends it silently."""
        with self._turn:
            self._taken = True
            yield

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM ends a rank of torchrun's with a word and status 143; another process as ever."""
        main = threading.current_thread() is threading.main_thread()  # no other may set a handler
        if not under_torchrun() or not main:
            yield
            return
        # Python runs a handler only between two lines of the main thread, which may wait inside a collective for
        # ever. The number of the signal is written to the pipe at once, and a thread of ours reads it there.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        listener = threading.Thread(
            target=self._listen, args=(reader,), name="listens for SIGTERM", daemon=True
        )
        listener.start()
        previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        previous = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            signal.set_wakeup_fd(previous_fd)
            os.close(writer)
            listener.join()  # it has read what came before
            os.close(reader)

    def _listen(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGTERM in numbers:
                self._end()

    def _end(self) -> None:
        rank = int(os.environ["RANK"])
        try:
            with self._turn:
                end_line()
                if not self._taken and is_teller_at_once(rank):
                    tell(self._verb, sigterm_sentence(rank))
        finally:
            os._exit(STATUS)
