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

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` the same sequence as ``source``; asked for where prompts are shared, or states are kept."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``length`` prompt tokens of a request."""

    request: Request
    start: int
    """Prompt tokens that are in before it."""
    length: int

    @property
    def answers(self) -> bool:
        """Whether it is the last of its prompt, after which the first new token is made; none is by a context."""
        return self.start + self.length == len(self.request.prompt) and self.request.followers is None


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
        return self.decodes + [chunk.request for chunk in self.chunks if chunk.answers]


class Scheduler:
    """Continuous batching over a fixed number of slots.

    Every request whose prompt is in decodes one token in every pass; in the same pass prompts are taken in, in
    order of arrival, up to a fixed number of tokens, a longer prompt in several passes. Memory is therefore bounded
    by the slots and that number, whatever the prompts' lengths. A request that ends gives its slot to the next that
    waits. The followers of a context (:mod:`tp_mamba.engine.shared`) begin before those that wait.

    Attributes:
        max_contexts: contexts that may have a slot at a time, at least one slot fewer than there are; with none, their
            followers are taken in one by one.
    """

    def __init__(self, max_prefill_tokens: int, max_contexts: int = 0) -> None:
        self.max_prefill_tokens, self.max_contexts = max_prefill_tokens, max_contexts
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
        contexts = [request for request in decodes if request.followers is not None]
        if contexts:
            decodes = [request for request in decodes if request.followers is None]
        budget, chunks = self.max_prefill_tokens, []
        if len(decodes) + len(contexts) < len(self._running):
            for request in self._running:
                if budget and request.remaining:
                    chunks.append(_next_chunk(request, budget))
                    budget -= chunks[-1].length
        admitted = []
        for context in contexts:
            while budget and context.followers and (slots.num_free or len(context.followers) == 1):
                admitted.append(self._begin_with(context, slots))
                chunks.append(_next_chunk(admitted[-1], budget))
                budget -= chunks[-1].length
        while self._waiting and slots.num_free:
            request = self._waiting[0]
            if reuse is not None and reuse.comes_soon(request, self._running, chunks):
                break
            if not budget:
                break
            if request.followers is not None and not self._has_room_for_context():
                if self.max_contexts:
                    break
                self._dissolve(request)
                continue
            request.slot = slots.allocate()
            self._running.append(self._waiting.popleft())
            if reuse is not None:
                reuse.begin(request, self._waiting[0] if self._waiting else None)
            admitted.append(request)
            chunks.append(_next_chunk(request, budget))
            budget -= chunks[-1].length
        return Schedule(decodes, chunks, admitted)

    def remove(self, request: Request) -> Request | None:
        """Take ``request`` out, wherever it is; its slot, if it has one, is the caller's to free.

        Returns:
            Its context, where that goes too, since nobody waits for it any more: its slot likewise.
        """
        context = request.context
        if context is None:
            (self._waiting if request.slot is None else self._running).remove(request)
            return None
        assert context.followers is not None
        context.followers.remove(request)
        request.context = None
        if context.followers:
            return None
        return self.remove(context) or context

    def _begin_with(self, context: Request, slots: Slots) -> Request:
        """The next follower of ``context``, which now has a slot with the state of that: the last one, its own."""
        followers, slot = context.followers, context.slot
        assert followers is not None and slot is not None  # noqa: PT018
        request = followers.pop(0)
        if followers:
            request.slot = slots.allocate()
            slots.copy(slot, request.slot)
        else:
            self._running.remove(context)
            request.slot, context.slot = slot, None
        request.taken, request.context = context.taken, None
        self._running.append(request)
        return request

    def _has_room_for_context(self) -> bool:
        return sum(request.followers is not None for request in self._running) < self.max_contexts

    def _dissolve(self, context: Request) -> None:
        """Let the followers of ``context``, which is the first that waits, be requests like others."""
        assert context.followers is not None
        self._waiting.popleft()
        for request in context.followers:
            request.context = None
        self._waiting.extendleft(reversed(context.followers))


def _next_chunk(request: Request, budget: int) -> Chunk:
    return Chunk(request, request.taken, min(request.next_stop - request.taken, budget))
