"""Prompts begin with the states of prompts before them: what the scheduler and the engine do with a prefix cache."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np

from tp_mamba.engine.request import Request
from tp_mamba.engine.scheduler import Chunk, Schedule
from tp_mamba.state.prefix import WORTHWHILE, PrefixCache, SnapshotCache, common_length

BLOCK_SIZE = 2048
"""Prompt tokens between two kept states, unless another number is asked for. Shorter steps use a GPU less well."""


class PrefixReuse:
    """The slots of a cache, divided: at most ``sequences`` for those that run, ``snapshots`` for states that are kept.

    A state is kept behind a whole prompt, behind what two prompts share, and every so many tokens
    (:meth:`PrefixCache.cuts`): there a prompt's tokens are cut, and the state is copied right after the step that made
    it. The slot of a text that has ended is kept as it is, so the next turn of a conversation begins there. Copies
    run on the stream of the steps, so they see the state of that step, also where the host is ahead.

    A hit gives the bits of a miss as far as cutting a prompt changes none: the kernels' results never depend on where
    it is cut, products of a library may.
    """

    def __init__(self, cache: SnapshotCache, sequences: int, snapshots: int, block_size: int | None) -> None:
        """Divide ``cache``, which has ``sequences + snapshots`` slots, all free; ``block_size`` is by default 2048."""
        self.prefixes = PrefixCache(cache, snapshots, block_size or BLOCK_SIZE)
        self._cache, self._spare = cache, sequences

    @property
    def num_free(self) -> int:
        """Sequences that can still begin to run."""
        return self._spare

    def allocate(self) -> int:
        """A slot for a sequence, in the state before the first token."""
        self._spare -= 1
        return self._cache.allocate()

    def free(self, slot: int) -> None:
        """Give back the slot of a sequence; nothing of it is kept."""
        self._spare += 1
        self._cache.free(slot)

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` the same sequence as ``source``."""
        self._cache.copy(source, target)

    def comes_soon(self, request: Request, running: Sequence[Request], chunks: Sequence[Chunk]) -> bool:
        """Whether one of ``running`` is about to leave a state with which ``request`` would rather begin.

        Where it is not yet beyond what the two share, it is told to leave one there. That is at most the rest of one
        prompt away, which goes on in every step (``chunks`` are those of this one), so nobody waits for ever.
        """
        taking_in = [other for other in running if other.remaining]
        if not taking_in:
            return False
        hit = self.prefixes.longest(request.prompt[: request.reusable + 1])
        enough = WORTHWHILE + (0 if hit is None else hit.count)
        soon = {chunk.request.index: chunk.start + chunk.length for chunk in chunks}
        for other in taking_in:
            shared = self._shared(request, other)
            if shared >= max(enough, soon.get(other.index, other.taken)) and shared not in other.cuts:
                insort(other.cuts, shared)
            if any(max(other.taken + 1, enough) <= count <= shared for count in other.cuts):
                return True
        return False

    def begin(self, request: Request, follower: Request | None) -> None:
        """Let ``request``, which has just got its slot, begin where a kept state ends.

        What it shares with ``follower``, the next in line, is a junction that nobody has seen yet: it cuts there.
        """
        hit = self.prefixes.use(request.prompt[: request.reusable + 1])
        if hit is not None:
            assert request.slot is not None
            self._cache.copy(hit.slot, request.slot)
            request.taken = hit.count
        cuts = set(self.prefixes.cuts(request.prompt, request.taken))
        if follower is not None:
            shared = self._shared(follower, request)
            if shared - request.taken >= WORTHWHILE:
                cuts.add(shared)
        request.cuts = sorted(cuts)

    @staticmethod
    def _shared(request: Request, other: Request) -> int:
        """How many tokens ``request`` could take over from ``other``."""
        prompts = (np.asarray(each.prompt, np.int64) for each in (request, other))
        return min(common_length(*prompts), request.reusable)

    def keep_cuts(self, schedule: Schedule) -> None:
        """Keep the states that the pass of ``schedule``, which was just launched, leaves at cuts of prompts."""
        for chunk in schedule.chunks:
            request, count = chunk.request, chunk.start + chunk.length
            if count in request.cuts:
                assert request.slot is not None
                self.prefixes.put(request.prompt[:count], request.slot)

    def keep_text(self, request: Request) -> None:
        """Take over the slot of ``request``, whose text has ended and whose tokens are all known.

        Its state stands for the prompt and all tokens but the last that was launched, which no step has read.
        """
        assert request.slot is not None
        self._spare += 1
        read = request.token_ids[: request.launched - 1]
        assert len(read) == request.launched - 1, "a step has read a token that the host has not seen"
        self.prefixes.give([*request.prompt, *read], request.slot)
