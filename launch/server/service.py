"""What is in flight, on the loop's thread: who may come in, who waits for which events, and who is cut off."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import TokenEvent
from tp_mamba.launch.server.errors import ApiError, refused
from tp_mamba.launch.server.metrics import Metrics
from tp_mamba.launch.server.stepping import Abort, Add, Batch, Refusal

State = Literal["serving", "draining", "lost"]

_RATE_WINDOW_S = 60.0
_LONGEST_RETRY_S = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the server takes on."""

    max_queue: int = 256
    """Texts that may wait for a slot."""
    max_tokens: int = 4096
    """New tokens of one text."""
    max_request_bytes: int = 4 * 2**20
    """Bytes of a request's body."""
    request_seconds: float = 600.0
    """From the arrival of a request to the end of its answer."""
    body_seconds: float = 30.0
    """For a request to arrive."""


@dataclass(slots=True)
class _Text:
    """A text that is being made."""

    job: Job
    choice: int
    first: float = 0.0
    tokens: int = 0


class Job:
    """The texts that one request is waiting for; use :meth:`take` until it gives nothing, and close it in the end."""

    def __init__(self, close: Callable[[Job], None]) -> None:
        self.arrived = time.monotonic()
        self.keys: set[int] = set()
        """Texts that are not finished."""
        self.timer: asyncio.TimerHandle | None = None
        self._close = close
        self._events: list[tuple[int, TokenEvent]] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    async def take(self) -> list[tuple[int, TokenEvent]]:
        """The events since the last call, each with its choice; waits for some. Empty when all texts are finished.

        Raises:
            ApiError: the request was cut off.
        """
        while not self._events and self._error is None and self.keys:
            self._news.clear()
            await self._news.wait()
        events, self._events = self._events, []
        if not events and self._error is not None:
            raise self._error
        return events

    def put(self, choice: int, event: TokenEvent) -> None:
        """Hand an event over."""
        self._events.append((choice, event))
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """Cut it off: what is there may still be taken, then comes ``error``."""
        if self._error is None:
            self._error = error
        self.close()
        self._news.set()

    def close(self) -> None:
        """Want nothing more; texts that are not finished are dropped."""
        if self.timer is not None:
            self.timer.cancel()
        self._close(self)


@dataclass(slots=True)
class Service:
    """All that is in flight."""

    give: Callable[[Add | Abort], None]
    """Hands a command to the engine's thread."""
    limits: Limits
    slots: int
    metrics: Metrics = field(default_factory=Metrics)
    state: State = "serving"
    reason: str = ""
    """Why the state is another than ``serving``, one sentence."""
    jobs: set[Job] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing is in flight."""
    _texts: dict[int, _Text] = field(default_factory=dict)
    _next: int = 0
    _finished: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.metrics.slots = self.slots
        self.idle.set()

    def check(self) -> None:
        """Refuse whoever asks while nothing is served.

        Raises:
            ApiError: 503.
        """
        if self.state != "serving":
            raise ApiError(503, self.reason, code="unavailable", headers={"Retry-After": "30"})

    def admit(self, prompts: Sequence[tuple[Sequence[int], SamplingParams]]) -> Job:
        """Have the engine continue ``prompts``, all or none; their texts in order are the choices.

        Raises:
            ApiError: 400 for more than ever fit, 429 for more than fit now, 503 when nothing is served.
        """
        self.check()
        capacity, texts = self.slots + self.limits.max_queue, sum(params.n for _, params in prompts)
        if texts > capacity:
            raise refused(
                f"the request asks for {texts} texts, the server holds {capacity} at most: divide it up"
            )
        if len(self._texts) + texts > capacity:
            seconds = self._wait_for(len(self._texts) + texts - capacity)
            raise ApiError(
                429,
                f"the server has {len(self._texts)} texts to make and holds {capacity} at most: ask again in "
                f"{seconds} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        job = Job(self._drop)
        choice = 0
        for position, (prompt, params) in enumerate(prompts):
            keys = range(self._next, self._next + params.n)
            self._next += params.n
            for key in keys:
                self._texts[key] = _Text(job, choice)
                choice += 1
            job.keys.update(keys)
            self.metrics.prompt_tokens += len(prompt)
            self.give(Add(keys, prompt, params, position))
        self.jobs.add(job)
        self._count()
        limit = self.limits.request_seconds
        error = ApiError(
            504,
            f"the answer was not finished within {limit:g} s: ask for fewer tokens",
            code="timeout",
            headers={"x-should-retry": "false"},
        )
        job.timer = asyncio.get_running_loop().call_later(limit, job.fail, error)
        return job

    def on_batch(self, batch: Batch) -> None:
        """Hand the events of a step to those who wait for them."""
        metrics, load = self.metrics, batch.load
        metrics.running, metrics.waiting, metrics.reused_tokens = (
            load.running,
            load.waiting,
            load.reused_tokens,
        )
        for key, event in batch.events:
            text = self._texts.get(key)
            if text is None:
                continue  # nobody wants it any more
            if isinstance(event, Refusal):
                text.job.fail(refused(event.sentence))
                continue
            self._measure(text, event, batch.when)
            if event.finish_reason is not None:
                del self._texts[key]
                text.job.keys.discard(key)
                self._finished.append(batch.when)
            text.job.put(text.choice, event)
        self._count()

    def cut(self, error: ApiError) -> None:
        """End all that is in flight with ``error``."""
        for job in list(self.jobs):
            job.fail(error)

    def drain(self, sentence: str) -> None:
        """Take nothing more; what is in flight goes on."""
        if self.state == "serving":
            self.state, self.reason = "draining", sentence

    def lose(self, sentence: str) -> None:
        """The engine is gone: nothing more will come."""
        if self.state != "lost":
            self.state, self.reason = "lost", sentence
            self.cut(ApiError(503, sentence, code="unavailable"))
            self.metrics.running = self.metrics.waiting = 0

    def _measure(self, text: _Text, event: TokenEvent, when: float) -> None:
        arrived, metrics = text.job.arrived, self.metrics
        if event.token_id is not None:
            metrics.new_tokens += 1
            text.tokens += 1
            if text.tokens == 1:
                text.first = when
                metrics.first_token.observe(when - arrived)
        if event.finish_reason is not None:
            metrics.finished[event.finish_reason] += 1
            metrics.whole.observe(when - arrived)
            if text.tokens > 1:
                metrics.per_token.observe((when - text.first) / (text.tokens - 1))

    def _drop(self, job: Job) -> None:
        for key in job.keys:
            if self._texts.pop(key, None) is not None:
                self.metrics.finished["abort"] += 1
                self.give(Abort(key))
        job.keys.clear()
        self.jobs.discard(job)
        self._count()

    def _count(self) -> None:
        self.metrics.open = len(self._texts)
        if self.jobs:
            self.idle.clear()
        else:
            self.idle.set()

    def _wait_for(self, texts: int) -> int:
        """Seconds until about ``texts`` have ended, as fast as they did of late."""
        now = time.monotonic()
        while self._finished and self._finished[0] < now - _RATE_WINDOW_S:
            self._finished.popleft()
        if not self._finished:
            return 5
        span = max(1.0, now - self._finished[0])
        return max(1, min(_LONGEST_RETRY_S, math.ceil(texts * span / len(self._finished))))
