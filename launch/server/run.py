"""Rank 0 from its first request to its last: the engine's thread, the HTTP server, signals, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tp_mamba.engine.leader import Leader
from tp_mamba.launch.ranks.failures import sentence_of, under_torchrun
from tp_mamba.launch.ranks.start import RANK_LOST
from tp_mamba.launch.server.app import Api, make_app
from tp_mamba.launch.server.codec import Codec
from tp_mamba.launch.server.errors import ApiError
from tp_mamba.launch.server.http import Server
from tp_mamba.launch.server.service import Limits, Service
from tp_mamba.launch.server.stepping import EngineThread, Stop

LINGER_SECONDS = 4.0
"""For which `/health` still tells that the engine is gone, before the process ends."""

CLOSE_SECONDS = 10.0
"""For the engine's thread to end its last step and let the other ranks go."""


class EngineLostError(RuntimeError):
    """A rank has ended while this one was serving."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to serve."""

    model: str
    limits: Limits
    drain_seconds: float
    key: str | None


class Session:
    """One run of the server."""

    def __init__(
        self,
        settings: Settings,
        codec: Codec,
        make_leader: Callable[[], Leader],
        on_listening: Callable[[], None],
    ) -> None:
        """Prepare; :meth:`run` serves.

        Args:
            settings: how to serve.
            codec: the tokenizer.
            make_leader: makes the engine's leader, on the engine's thread.
            on_listening: called once requests are taken.
        """
        self._settings, self._codec, self._make_leader = settings, codec, make_leader
        self._on_listening = on_listening

    async def run(self, listener: socket.socket) -> None:
        """Serve on ``listener`` until a signal asks for the end, and every answer has been given or cut.

        Raises:
            Exception: what ended the engine.
        """
        self._loop = loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[BaseException | None] = loop.create_future()
        self._asked = asyncio.Event()
        ready: asyncio.Future[int] = loop.create_future()
        self._service: Service | None = None
        self._engine = EngineThread(
            self._make_leader,
            lambda slots: self._tell(_set, ready, slots),
            lambda batch: self._tell(self._batch, batch),
            lambda error: self._tell(self._end, error),
        )
        with self._signals():
            self._engine.start()
            await asyncio.wait(
                (ready, self._ended, asked := loop.create_task(self._asked.wait())),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if ready.done():
                await self._serve(ready.result(), listener)
            asked.cancel()
            if not self._ended.done():
                self._engine.give(Stop())
            done, _ = await asyncio.wait((self._ended,), timeout=CLOSE_SECONDS)
        if not done:
            raise EngineLostError(f"the engine did not end its last step within {CLOSE_SECONDS:g} s")
        if (error := self._ended.result()) is not None:
            raise error

    async def _serve(self, slots: int, listener: socket.socket) -> None:
        settings = self._settings
        service = Service(self._engine.give, settings.limits, slots)
        self._service = service
        api = Api(service=service, codec=self._codec, model=settings.model)
        server = Server(make_app(api, settings.key), self._on_listening)
        serving = self._loop.create_task(server.serve([listener]))
        asked = self._loop.create_task(self._asked.wait())
        await asyncio.wait((serving, asked, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not self._ended.done():
            await self._drain(service)
        if self._ended.done():
            await asyncio.sleep(LINGER_SECONDS)
        server.should_exit = True
        await serving
        asked.cancel()

    async def _drain(self, service: Service) -> None:
        """Let what is in flight end, within ``drain_seconds``, and cut the rest."""
        service.drain("the server is shutting down: ask another one")
        idle = self._loop.create_task(service.idle.wait())
        await asyncio.wait(
            (idle, self._ended), timeout=self._settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        idle.cancel()
        if not self._ended.done():
            service.cut(
                ApiError(
                    503, "the server shut down before this answer was finished: ask again", code="unavailable"
                )
            )

    def _tell(self, call: Callable[..., Any], *args: Any) -> None:
        """Have the loop make a call, from the engine's thread; a loop that has ended needs no news."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _batch(self, batch: Any) -> None:
        if self._service is not None:
            self._service.on_batch(batch)

    def _end(self, error: BaseException | None) -> None:
        if self._ended.done():
            return
        self._ended.set_result(error)
        if error is not None and self._service is not None:
            self._service.lose(f"the engine has ended ({sentence_of(error, 0)}): start the server again")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT ask for the end, a second one on a server of one rank ends at once, and
        :data:`RANK_LOST` ends the engine."""
        previous = signal.set_wakeup_fd(-1)  # under torchrun whoever reads it would end this process
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
        old = {number: signal.getsignal(number) for number in (*numbers, RANK_LOST)}
        for number in numbers:
            self._loop.add_signal_handler(number, self._ask, number)
        lost = EngineLostError("another rank has ended")
        self._loop.add_signal_handler(RANK_LOST, self._end, lost)
        try:
            yield
        finally:
            for number in old:
                self._loop.remove_signal_handler(number)
            for number, handler in old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous)

    def _ask(self, number: int) -> None:
        # The launcher passes its signal on, and a terminal or supervisor may send it to all processes as well.
        if self._asked.is_set() and not under_torchrun():
            sys.stderr.flush()
            os._exit(128 + number)
        self._asked.set()


def _set(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)


def listen(host: str, port: int) -> socket.socket:
    """A socket at ``host`` and ``port`` that takes connections once the server does.

    Raises:
        OSError: the address is not this host's, or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise OSError(
            f"cannot listen at {host} port {port} ({error.strerror}): give another --port, or 0 for one that is free"
        ) from error
    return listener
