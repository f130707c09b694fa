"""Ranks for the tests of sums between GPUs: interpreted kernels that reach one another's memory, in a chosen order.

Interpreted loads and stores act on addresses, so any memory of this process does for that of the GPUs. A rank is a
thread, of which one runs at a time; it may be made to give way at any access to memory, in the middle of a store too.
So the order in which the ranks get on is drawn from a seed and not the machine's, a rank may be late by whatever there
is to do for the others, and ranks that wait for one another are noticed at once. (Every access is seen by all as soon
as it is made: the orders of memory of a GPU are not among what is explored.)
"""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tp_mamba.kernels.all_reduce import Exchange
from tp_mamba.kernels.all_reduce.layout import inbox_bytes
from tp_mamba.kernels.all_reduce.shares import Shares

PROGRAMS = 2


class Schedule:
    """Whose turn it is."""

    def __init__(self, size: int, seed: int | None, builder: Any) -> None:
        """``seed``: ranks give way at random; None: only when what they look for is not there."""
        self._random = None if seed is None else random.Random(seed)
        self._builder = builder
        self._turn = [threading.Semaphore(0) for _ in range(size)]
        self._stores = 0
        self._looked_at: list[int] = [-1] * size
        """By rank: how much had been stored by all when it last looked in vain; -1 since it got on."""
        self._late, self._ended = [False] * size, [False] * size
        self._late_at, self._accesses = [-1] * size, [0] * size
        self.failure: str | None = None
        self._now = 0
        self._turn[0].release()

    def late_once(self, access: int) -> None:
        """Have the rank that calls this wait, before its next but so many accesses, until no other can get on."""
        self._late_at[self._now] = self._accesses[self._now] + access

    def begin(self, rank: int) -> None:
        self._turn[rank].acquire()

    def end(self, rank: int, failure: str | None) -> None:
        self.failure = self.failure or failure
        self._ended[rank] = True
        self._pass_on(rank)

    def access(self) -> None:
        """Before an access of the rank whose turn it is."""
        rank = self._now
        self._accesses[rank] += 1
        self._looked_at[rank] = -1
        if self._accesses[rank] == self._late_at[rank]:
            self._late[rank] = True
            self._give_way(rank)
        elif self._random is not None and self._random.random() < 0.3:
            self._give_way(rank)

    def stored(self) -> None:
        self._stores += 1

    def in_vain(self) -> None:
        """The rank whose turn it is has looked for what is not there."""
        self._looked_at[self._now] = self._stores
        self._give_way(self._now)

    def _give_way(self, rank: int) -> None:
        here = self._builder.grid_idx, self._builder.grid_dim
        self._pass_on(rank)
        self._turn[rank].acquire()
        if self.failure is not None:
            raise RuntimeError("another rank failed")
        self._builder.grid_idx, self._builder.grid_dim = here

    def _pass_on(self, rank: int) -> None:
        size = len(self._turn)
        left = [r % size for r in range(rank + 1, rank + 1 + size) if not self._ended[r % size]]
        if not left:
            return
        able = [r for r in left if not self._late[r] and self._looked_at[r] != self._stores]
        if not able and self.failure is None:
            able = [r for r in left if self._late[r]]
            for r in able:
                self._late[r] = False
            if not able:
                self.failure = f"ranks {sorted(left)} wait for one another"
        able = able or left
        self._now = self._random.choice(able) if self._random is not None else able[0]
        self._turn[self._now].release()


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    programs: int = PROGRAMS,
    round_: int = 0,
    room: int | None = None,
) -> list[Any]:
    """``function(exchange, schedule, *args)`` as every rank of ``size``; their results in rank order.

    To be called in a process in which kernels are interpreted.

    Args:
        round_: the round, modulo the window, that all programs begin with.
        room: bytes of a large sum; ``function`` is given :class:`Shares` of so many instead of an exchange.

    Raises:
        AssertionError: a rank failed, ranks wait for one another, a block was sent onto one that was not taken yet,
            or marks are missing at the end.
    """
    from triton.runtime import interpreter

    if room is None:
        inboxes, memory = _exchanges(size, programs, round_)
    else:
        inboxes, memory = _shares(size, room, round_)
    schedule = Schedule(size, seed, interpreter.interpreter_builder)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        schedule.begin(rank)
        failure = None
        try:
            with torch.no_grad():
                results[rank] = function(memory[rank], schedule, *args)
        except BaseException:
            failure = f"rank {rank}: {traceback.format_exc()}"
        schedule.end(rank, failure)

    spans = [range(inbox.data_ptr(), inbox.data_ptr() + inbox.numel()) for inbox in inboxes]
    with _one_language(interpreter), _told_of_accesses(interpreter, schedule, spans):
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert schedule.failure is None, schedule.failure
    assert all(bool((inbox == 255).all()) for inbox in inboxes), "not all marks were put back"
    return results


def _addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def _exchanges(size: int, programs: int, round_: int) -> tuple[list[torch.Tensor], list[Exchange]]:
    """Inboxes of all ranks, and what each rank holds of them."""
    inboxes = [torch.full((inbox_bytes(size, programs),), 255, dtype=torch.uint8) for _ in range(size)]
    rounds = [torch.full((programs,), round_, dtype=torch.int32) for _ in range(size)]
    return inboxes, [Exchange(rank, _addresses(inboxes), rounds[rank]) for rank in range(size)]


def _shares(size: int, room: int, round_: int) -> tuple[list[torch.Tensor], list[Shares]]:
    """The same for large sums of up to ``room`` bytes."""
    terms, rows = (
        tuple(torch.empty(nbytes, dtype=torch.uint8) for _ in range(size)) for nbytes in (size * room, room)
    )
    terms_inboxes, terms_sent = _exchanges(size, 1, round_)
    rows_inboxes, rows_sent = _exchanges(size, 1, round_)
    held = zip(terms_sent, rows_sent, strict=True)
    return terms_inboxes + rows_inboxes, [Shares(terms, rows, *words) for words in held]


@contextmanager
def _one_language(interpreter: Any) -> Iterator[None]:
    """Keep Triton's language the interpreted one, which a launch of one rank would undo in the midst of another's."""
    scope = interpreter._patch_lang(None)
    try:
        yield
    finally:
        scope.restore()


@contextmanager
def _told_of_accesses(interpreter: Any, schedule: Schedule, inboxes: list[range]) -> Iterator[None]:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    random_ = np.random.default_rng(0)

    def telling_load(
        self: Any, ptrs: Any, mask: Any, other: Any, cache: Any, evict: Any, volatile: Any
    ) -> Any:
        schedule.access()
        loaded = load(self, ptrs, mask, other, cache, evict, volatile)
        if volatile and (loaded.data == -1).any():
            schedule.in_vain()
        return loaded

    def telling_store(self: Any, ptrs: Any, value: Any, mask: Any, cache: Any, evict: Any) -> Any:
        first = int(ptrs.data.reshape(-1)[0])
        sent = any(first in inbox for inbox in inboxes) and bool((value.data != -1).any())
        half = random_.random(ptrs.data.shape) < 0.5
        for part in (mask.data & half, mask.data & ~half):
            schedule.access()
            if sent and part.any():
                free = load(self, ptrs, handle(part, mask.dtype), None, None, None, False)
                assert (free.data[part] == -1).all(), "sent onto what was not taken yet"
            store(self, ptrs, value, handle(part, mask.dtype), cache, evict)
            schedule.stored()

    builder.create_masked_load, builder.create_masked_store = telling_load, telling_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def terms_of(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Every rank's term, the same list on every rank, of sizes that make the order of a sum show."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 10.0 ** (rank % 3)).to(dtype) for rank in range(size)]


def in_rank_order(terms: list[torch.Tensor]) -> torch.Tensor:
    """What every sum is to be, to the bit."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total.to(terms[0].dtype)
