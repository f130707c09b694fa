"""Rank 0 decides and the others follow: requests that only rank 0 knows of, served by every rank.

An :class:`~tp_mamba.engine.engine.Engine` wants the same calls on every rank. Where requests arrive at one rank, from a
file or over a network, that rank leads: its calls are passed on, all those between two steps in one small broadcast,
and every rank makes them. ::

    engine = Engine(model, tokenizer)
    if tp.rank > 0:
        return follow(engine, tp)
    with Leader(engine, tp) as leader:
        leader.add_request(prompt, params)     # or abort(index), at any time
        events = leader.step()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import TokenEvent
from tp_mamba.parallel.group import RankFailedError, TensorParallel
from tp_mamba.parallel.words import WordsOfRank0


@dataclass(frozen=True, slots=True)
class _Add:
    """Requests that begin alike, mostly one, as rank 0 has checked them."""

    indices: range
    prompts: list[np.ndarray]
    """Token ids, packed: a prompt of a list of ints would be several times longer on the way."""
    params: SamplingParams | Sequence[SamplingParams] | None
    position: int


@dataclass(frozen=True, slots=True)
class _Abort:
    """A request that is to be dropped."""

    index: int


@dataclass(frozen=True, slots=True)
class _End:
    """There are no more steps."""

    error: str | None
    """What went wrong on rank 0, if something did."""


class Leader:
    """Rank 0's engine, whose calls the other ranks repeat; they run :func:`follow`.

    It is used by one thread, as an engine is. With nothing to do, :meth:`step` is still to be called every few minutes:
    it tells the others that rank 0 is there, and they take a longer silence (the group's timeout) for its end.

    Use it as a context manager: an error inside the block ends the other ranks too.
    """

    def __init__(self, engine: Engine, tp: TensorParallel) -> None:
        """Start ``engine`` together with the others; ``tp`` is its model's.

        Raises:
            ValueError: this is another rank than 0, or as :meth:`Engine.start`.
            RankFailedError: another rank could not start.
        """
        if tp.rank != 0:
            raise ValueError(f"rank {tp.rank} cannot lead: rank 0 does, and the others call follow()")
        self._engine, self._calls = engine, list[_Add | _Abort]()
        self._together = True
        engine.start()
        self._words = WordsOfRank0(tp)

    @property
    def max_batch_size(self) -> int:
        """Sequences that run at a time."""
        assert self._engine.max_batch_size is not None  # it has started
        return self._engine.max_batch_size

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return self._engine.has_work

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are running, and how many wait."""
        return self._engine.load

    @property
    def reused_tokens(self) -> int:
        """As :attr:`Engine.reused_tokens`."""
        return self._engine.reused_tokens

    def add_request(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, position: int = 0
    ) -> int:
        """As :meth:`Engine.add_request`; a request that is refused here reaches no other rank."""
        return self.add_alike([prompt], params, position=position)[0]

    def add_alike(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        position: int = 0,
    ) -> range:
        """As :meth:`Engine.add_alike`; requests that are refused here reach no other rank."""
        indices = self._engine.add_alike(prompts, params, position=position)
        packed = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        self._calls.append(_Add(indices, packed, params, position))
        return indices

    def abort(self, index: int) -> bool:
        """As :meth:`Engine.abort`."""
        known = self._engine.abort(index)
        if known:
            self._calls.append(_Abort(index))
        return known

    def step(self) -> list[TokenEvent]:
        """As :meth:`Engine.step`, on every rank; without work, a sign of life."""
        calls, self._calls = self._calls, []
        self._together = False  # an error in here may leave the others anywhere
        self._words.pass_on(calls)
        events = self._engine.step()
        self._together = True
        return events

    def close(self, error: BaseException | None = None) -> None:
        """Let the other ranks return, or fail with ``error``; a second call does nothing."""
        if self._together:
            self._together = False
            self._words.pass_on(_End(None if error is None else f"{type(error).__name__}: {error}"))
            self._words.close()
        self._engine.close()

    def __enter__(self) -> Leader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


def follow(engine: Engine, tp: TensorParallel) -> None:
    """Repeat what rank 0's :class:`Leader` does, until it closes; for every rank but 0.

    Raises:
        RankFailedError: rank 0 has closed because of an error.
        RuntimeError: rank 0 has gone without a word.
        ValueError: as :meth:`Engine.start`.
    """
    with engine:
        engine.start()
        words = WordsOfRank0(tp)
        while not isinstance(calls := words.pass_on(), _End):
            for call in calls:
                if isinstance(call, _Abort):
                    engine.abort(call.index)
                    continue
                prompts = [prompt.tolist() for prompt in call.prompts]
                indices = engine.add_alike(prompts, call.params, position=call.position)
                assert indices == call.indices, "this rank's engine has had requests of its own"
            engine.step()
        words.close()
    if calls.error is not None:
        raise RankFailedError(f"rank 0 of {tp.size} failed: {calls.error}")
