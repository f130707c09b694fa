"""What runs next: which requests advance in the next forward pass, and by how much.

Decisions rest on host values that are the same on every rank, so the ranks never need to talk about them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tp_mamba.engine.request import Request


class Slots(Protocol):
    """Where sequences keep their state, as far as scheduling goes."""

    @property
    def num_free(self) -> int:
        """Slots that :meth:`allocate` can still hand out."""

    def allocate(self) -> int:
        """Take a free slot, in the state before the first token."""

    def free(self, slot: int) -> None:
        """Give it back."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``length`` prompt tokens of a request."""

    request: Request
    start: int
    """Prompt tokens that are in before it."""
    length: int

    @property
    def completes(self) -> bool:
        """Whether it is the last of its prompt, after which the first new token is made."""
        return self.start + self.length == len(self.request.prompt)


class Reuse(Protocol):
    """How prompts come by the states of others that begin alike (:class:`tp_mamba.engine.reuse.PrefixReuse`)."""

    def comes_soon(self, request: Request, running: Sequence[Request], chunks: Sequence[Chunk]) -> bool:
        """Whether one of ``running`` is about to leave a state with which ``request`` would rather begin; ``chunks``
        are those of this step so far."""

    def begin(self, request: Request, follower: Request | None) -> None:
        """Let ``request``, which has just got its slot, begin where a kept state ends; ``follower`` comes next."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One forward pass: a token of each of ``decodes``, then ``chunks`` of prompts."""

    decodes: list[Request]
    chunks: list[Chunk]
    admitted: list[Request]
    """Requests that got their slot for this pass; each has a chunk."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to run."""
        return not self.decodes and not self.chunks

    @property
    def sampling(self) -> list[Request]:
        """Requests that make a token in this pass, in the order of their logits: the decodes, then the prompts
        that are complete."""
        return self.decodes + [chunk.request for chunk in self.chunks if chunk.completes]


class Scheduler:
    """Continuous batching over a fixed number of slots.

    Every request whose prompt is in decodes one token in every pass; in the same pass prompts are taken in, in
    order of arrival, up to a fixed number of tokens, a longer prompt in several passes. Memory is therefore bounded
    by the slots and that number, whatever the prompts' lengths. A request that ends gives its slot to the next that
    waits.
    """

    def __init__(self, max_prefill_tokens: int) -> None:
        self.max_prefill_tokens = max_prefill_tokens
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._running or self._waiting)

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are running, and how many wait."""
        return len(self._running), len(self._waiting)

    def add(self, request: Request) -> None:
        """Put ``request`` behind those that wait."""
        self._waiting.append(request)

    def schedule(self, slots: Slots, reuse: Reuse | None = None) -> Schedule:
        """The next pass; requests that wait take ``slots`` while there are free ones and prompt tokens to spare.

        With ``reuse`` the first of them, and so all behind it, also waits for a state that it can begin with.
        """
        # Every running request has a slot and has not ended, so that the prompt alone tells the two states apart.
        decodes = [request for request in self._running if not request.remaining]
        budget, chunks = self.max_prefill_tokens, []
        if len(decodes) < len(self._running):
            for request in self._running:
                if budget and request.remaining:
                    chunks.append(_next_chunk(request, budget))
                    budget -= chunks[-1].length
        admitted = []
        while self._waiting and slots.num_free:
            request = self._waiting[0]
            if reuse is not None and reuse.comes_soon(request, self._running, chunks):
                break
            if not budget:
                break
            request.slot = slots.allocate()
            self._running.append(self._waiting.popleft())
            if reuse is not None:
                reuse.begin(request, self._waiting[0] if self._waiting else None)
            admitted.append(request)
            chunks.append(_next_chunk(request, budget))
            budget -= chunks[-1].length
        return Schedule(decodes, chunks, admitted)

    def remove(self, request: Request) -> None:
        """Take ``request`` out, wherever it is; its slot, if it has one, is the caller's to free."""
        if request.slot is None:
            self._waiting.remove(request)
        else:
            self._running.remove(request)


def _next_chunk(request: Request, budget: int) -> Chunk:
    return Chunk(request, request.taken, min(request.next_stop - request.taken, budget))
