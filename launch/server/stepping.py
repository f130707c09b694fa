"""The thread that owns the engine: commands come in by a queue, events go out in batches, one batch a step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tp_mamba.engine.leader import Leader
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import TokenEvent

SIGN_OF_LIFE_S = 2.0
"""Between two steps without work. They keep the other ranks waiting for more, and notice when one has gone."""


@dataclass(frozen=True, slots=True)
class Add:
    """Continue a prompt, which was checked, as often as ``params.n`` says."""

    keys: Sequence[int]
    """The asker's names for its texts, one for each; events come under these."""
    prompt: Sequence[int]
    params: SamplingParams
    position: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody wants the events of ``key`` any more."""

    key: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Let the other ranks return, and end."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The engine did not take a request."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine has to do."""

    running: int
    waiting: int
    reused_tokens: int


@dataclass(slots=True)
class Batch:
    """What one step has brought."""

    events: list[tuple[int, TokenEvent | Refusal]] = field(default_factory=list)
    """By key, in order."""
    load: Load = Load(0, 0, 0)
    when: float = 0.0
    """``time.monotonic()`` at its end."""


class EngineThread(threading.Thread):
    """Steps an engine while it has work, and hands on what comes of it.

    ``on_batch`` and ``on_end`` are called on this thread.
    """

    def __init__(
        self,
        make_leader: Callable[[], Leader],
        on_ready: Callable[[int], None],
        on_batch: Callable[[Batch], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        """Prepare; :meth:`start` begins.

        Args:
            make_leader: makes the engine's leader, on this thread, which then owns the ranks' process group.
            on_ready: told how many sequences run at a time, once the engine can take requests.
            on_batch: given the events of a step, if there are any or the load has changed.
            on_end: told at the end what ended it; None after :class:`Stop`.
        """
        super().__init__(
            name="engine", daemon=True
        )  # a rank that is gone may keep it in a collective for ever
        self._make_leader, self._on_ready, self._on_batch, self._on_end = (
            make_leader,
            on_ready,
            on_batch,
            on_end,
        )
        self._commands: queue.SimpleQueue[Add | Abort | Stop] = queue.SimpleQueue()
        self._keys: dict[int, int] = {}
        self._indices: dict[int, int] = {}

    def give(self, command: Add | Abort | Stop) -> None:
        """Have ``command`` done before the next step; from any thread."""
        self._commands.put(command)

    def run(self) -> None:
        """The thread's work."""
        try:
            with self._make_leader() as leader:
                self._on_ready(leader.max_batch_size)
                while self._round(leader):
                    pass
        except BaseException as error:
            self._on_end(error)
        else:
            self._on_end(None)

    def _round(self, leader: Leader) -> bool:
        batch = Batch()
        for command in self._take(wait=not leader.has_work):
            if isinstance(command, Stop):
                return False
            if isinstance(command, Add):
                self._add(leader, command, batch)
            elif (index := self._indices.pop(command.key, None)) is not None:
                del self._keys[index]
                leader.abort(index)
        for event in leader.step():
            key = self._keys[event.index]
            batch.events.append((key, event))
            if event.finish_reason is not None:
                del self._keys[event.index], self._indices[key]
        running, waiting = leader.load
        batch.load, batch.when = Load(running, waiting, leader.reused_tokens), time.monotonic()
        self._on_batch(batch)
        return True

    def _add(self, leader: Leader, command: Add, batch: Batch) -> None:
        try:
            index = leader.add_request(command.prompt, command.params, position=command.position)
        except ValueError as error:
            batch.events.append((command.keys[0], Refusal(str(error))))
            return
        for at, key in enumerate(command.keys, index):
            self._keys[at], self._indices[key] = key, at

    def _take(self, *, wait: bool) -> list[Add | Abort | Stop]:
        """All commands there are; with ``wait`` at least one, unless none comes for :data:`SIGN_OF_LIFE_S`."""
        commands = []
        try:
            if wait:
                commands.append(self._commands.get(timeout=SIGN_OF_LIFE_S))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands
