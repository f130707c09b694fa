"""How likely continuations are, and texts from prompts: the two things that a benchmark asks an engine for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from tp_mamba.engine.collected import Collected
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import TokenEvent

AHEAD = 2
"""Requests that the engine holds, as a multiple of those that run at a time."""

SILENCE_S = 60.0
"""Seconds without a step after which the other ranks are told that rank 0 is still there."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of what continues it, at least one."""


class Asked(Protocol):
    """What serves requests: a Leader on rank 0, or an Engine that every rank uses alike."""

    @property
    def max_batch_size(self) -> int | None:
        """Sequences that run at a time."""

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""

    def add_alike(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        position: int = 0,
    ) -> range:
        """Add prompts that begin alike."""

    def step(self) -> list[TokenEvent]:
        """The events of one step."""


class Scoring:
    """Asks ``engine`` for scores and texts, as many at a time as it runs.

    While nothing is asked for, a benchmark reads files or counts; a :class:`Leader` is then stepped once a minute by a
    thread of its own, so that the other ranks know of it.
    """

    def __init__(self, engine: Asked) -> None:
        self._engine = engine
        self._turn = threading.Lock()  # an engine is used by one thread at a time

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: the sum of the logarithms of its tokens' probabilities, and whether
        each of them is the likeliest there.

        Pairs with one context, wherever they stand, have it computed once.

        Raises:
            RuntimeError: the model's logits are not finite.
        """
        together: dict[tuple[int, ...], list[int]] = {}
        for place, (context, _) in enumerate(pairs):
            together.setdefault(tuple(context), []).append(place)
        jobs, places = [], []
        for context, same in together.items():
            prompts = [[*context, *pairs[place][1]] for place in same]
            params = SamplingParams(
                max_new_tokens=1, prompt_logprobs=1, prompt_logprobs_start=len(context), ignore_eos=True
            )
            jobs.append((prompts, params))
            places.extend(same)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for place, made in zip(places, self._run(jobs), strict=True):
            scored = [each for each in made.prompt_logprobs or () if each is not None]
            greedy = all(each.top[0][0] == each.token_id for each in scored)
            found[place] = sum(each.logprob for each in scored), greedy
        return found

    def continuations(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        """The new tokens of each of ``prompts``.

        Raises:
            RuntimeError: the model's logits are not finite.
        """
        jobs = [([prompt], each) for prompt, each in zip(prompts, params, strict=True)]
        return [made.token_ids for made in self._run(jobs)]

    def _run(self, jobs: Sequence[tuple[Sequence[Sequence[int]], SamplingParams]]) -> list[Collected]:
        """What becomes of the prompts of ``jobs``, in order; those of one job begin alike."""
        engine, waiting = self._engine, iter(enumerate(jobs))
        found: list[Collected] = []
        running: dict[int, Collected] = {}
        with self._turn:
            most = AHEAD * (engine.max_batch_size or 1)
            while True:
                while len(running) < most and (job := next(waiting, None)) is not None:
                    position, (prompts, params) = job
                    for index in engine.add_alike(prompts, params, position=position):
                        found.append(Collected())
                        running[index] = found[-1]
                if not running:
                    return found
                for event in engine.step():
                    running[event.index].take(event)
                    if event.error is not None:
                        raise RuntimeError(event.error)
                    if event.finish_reason is not None:
                        del running[event.index]

    @contextmanager
    def kept_alive(self, seconds: float = SILENCE_S) -> Iterator[None]:
        """Inside, the engine is stepped every so many ``seconds``, whatever the caller does.

        An error of such a step is raised at the end.
        """
        over, failures = threading.Event(), list[BaseException]()

        def stay() -> None:
            while not over.wait(seconds):
                with self._turn:
                    try:
                        self._engine.step()
                    except BaseException as failure:
                        failures.append(failure)
                        return

        thread = threading.Thread(target=stay, name="tp-mamba-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failures:
            raise failures[0]
