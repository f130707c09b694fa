"""The engine: requests come and go, and every step makes one more token of each that is running."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from tokenizers import Tokenizer

from tp_mamba.engine.choice import NOT_FINITE
from tp_mamba.engine.cut_vocabulary import CutVocabulary
from tp_mamba.engine.graphs import CaptureReport, CudaCapture
from tp_mamba.engine.intake import RequestBuilder, checked_limit
from tp_mamba.engine.ladder import Ladder
from tp_mamba.engine.memory import (
    MEMORY_FRACTION,
    ClampedWarning,
    Limits,
    Needs,
    agree_on_limits,
    checked_fraction,
)
from tp_mamba.engine.model import Cache, Model
from tp_mamba.engine.params import SamplingParams, integer, with_options
from tp_mamba.engine.request import Request, TokenEvent
from tp_mamba.engine.reuse import PrefixReuse
from tp_mamba.engine.runner import Runner
from tp_mamba.engine.sampler import Sampler
from tp_mamba.engine.scheduler import Schedule, Scheduler
from tp_mamba.options import CacheConfig
from tp_mamba.parallel.turns import hold
from tp_mamba.state.prefix import PrefixCache
from tp_mamba.state.prefix_files import load_prefixes, save_prefixes

MAX_BATCH_SIZE = 256
"""Sequences at a time, unless another number is asked for; fewer where memory is short."""

MAX_SNAPSHOTS = 64
"""States kept for prompts to come, with prefix caching; fewer where memory is short."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was launched, and whose tokens may still be on their way."""

    requests: list[Request]
    """Those that make a token in it."""
    receive: Callable[[], list[int]]
    """Waits for the tokens."""


class Engine:
    """Continues requests together, each with parameters of its own, on a state cache of its own.

    Each of its parts has a file: :class:`Scheduler` decides which requests advance, :class:`Runner` makes one
    forward pass of that, :class:`Sampler` turns logits into tokens. A request's tokens do not depend on the
    requests beside it, as far as the model's logits do not.

    On a GPU a step is one replay of a captured graph (:mod:`tp_mamba.engine.graphs`), and the host works one step
    behind: the next step is launched before the tokens of this one are known, which it takes from the device's memory.
    Text and conditions to stop follow. A sequence that turns out to have ended was then taken a token further, which
    nobody sees; its slot is free all the same, since whoever gets it comes later on the device too.

    Every rank makes the same calls with the same arguments in the same order, and gets the same events. An engine is
    used by one thread at a time, and no other thread generates over the same ranks while it is open.

    Use it as a context manager, or call :meth:`close` at the end.

    Attributes:
        max_batch_size: sequences, and so state slots, at a time; None until it is chosen by :meth:`start`.
        max_prefill_tokens: prompt tokens of one forward pass.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch_size: int | None = None,
        max_prefill_tokens: int = 8192,
        memory_fraction: float = MEMORY_FRACTION,
        eager: bool = False,
        overlap: bool | None = None,
        check_steps: bool = False,
        cache_config: CacheConfig | None = None,
        gather_logits: bool = True,
    ) -> None:
        """Check the arguments; memory is taken by :meth:`start`.

        Args:
            model: what :class:`tp_mamba.engine.model.Model` describes, such as a MambaForCausalLM.
            tokenizer: turns tokens into text; without one events carry ids only. Ids above all of its own, which
                pad the vocabulary of many files, are never made.
            max_batch_size: sequences at a time; the others wait. By default 256. :meth:`start` lowers it to what fits
                into the memory that is free, with a :class:`ClampedWarning` if it was given.
            max_prefill_tokens: prompt tokens of one forward pass; longer prompts are cut. Activations take memory
                in proportion to this, not to the prompts' lengths. Lowered likewise.
            memory_fraction: part of the memory that is free at the start which activations and states may take.
            eager: launch every kernel from the host instead of capturing steps; always so on a CPU.
            overlap: launch a step before the tokens of the one before are known to the host; the events are the same.
                By default on a GPU.
            check_steps: for debugging: compare every index of a step with the requests it is for, and what lies in the
                device's buffer with what may, before the step runs. It waits for the device in every step.
            cache_config: whether states are kept for prompts that begin alike, and how many tokens lie between two of
                them; by default what the model was made with.
            gather_logits: bring whole rows of logits to every rank before tokens are chosen. Without, they are chosen
                over the cut vocabulary, and are the same: far fewer bytes travel, in more and smaller collectives.

        Raises:
            ValueError: a limit that is no integer or below 1, a fraction that is none, or a tokenizer without tokens.
        """
        self.max_batch_size = None
        if max_batch_size is not None:
            self.max_batch_size = checked_limit("max_batch_size", max_batch_size)
        self.max_prefill_tokens = checked_limit("max_prefill_tokens", max_prefill_tokens)
        self._memory_fraction = checked_fraction(memory_fraction)
        self._capturing, self._check_steps = model.device.type == "cuda" and not eager, check_steps
        self._cache_config = cache_config or getattr(model, "cache_config", None) or CacheConfig()
        self._ahead = int(model.device.type == "cuda" if overlap is None else overlap)
        self._gather_logits = gather_logits
        self._pending: deque[_Step] = deque()
        self._stream: torch.cuda.Stream | None = None
        self._captured = CaptureReport()
        self._model = model
        self._builder = RequestBuilder(model.config, tokenizer)
        self._scheduler = Scheduler(self.max_prefill_tokens)
        self._requests: dict[int, Request] = {}
        self._added = 0
        self._closed = False
        self._parts: tuple[Cache, Runner, Sampler] | None = None
        self._reuse: PrefixReuse | None = None
        self._reused = 0
        self._let_go: Callable[[], object] = lambda: None

    def add_request(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, position: int = 0
    ) -> int:
        """Put a prompt behind those that wait; the next :meth:`step` may take it in.

        Args:
            prompt: its token ids.
            params: how to choose its tokens and when to stop; by default greedy, 128 tokens.
            position: with ``params.seed`` it fixes the random numbers, so that the same prompt gives the same text
                whatever runs beside it; other positions of one seed give other texts.

        Returns:
            The request's id, the ``index`` of its events: 0 for the first request, then 1, and so on.

        Raises:
            ValueError: an empty prompt, ids that are no integers or outside the vocabulary, stop strings without a
                tokenizer, a position out of range, or a closed engine.
        """
        self._check_open()
        if not 0 <= integer("position", position) < 2**64:
            raise ValueError(f"position={position} is out of range: it lies between 0 and 2**64 - 1")
        request = self._builder.build(self._added, prompt, with_options(params, {}), int(position))
        self._added += 1
        self._requests[request.index] = request
        self._scheduler.add(request)
        return request.index

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._requests)

    @property
    def captured(self) -> CaptureReport:
        """How many steps were captured so far, and in what time."""
        return self._captured

    def start(self, at_most: int | None = None) -> None:
        """Choose :attr:`max_batch_size` if none was given, and make the state cache; a second call does nothing.

        Every rank calls this; the first :meth:`step` does so otherwise. All ranks choose the same: what fits on the
        one with the least free memory.

        Args:
            at_most: as many sequences as will ever run at a time; 256 where that is not known and no
                ``max_batch_size`` was given.

        Raises:
            ValueError: another thread generates over the same ranks, or the engine is closed.
            RankFailedError: another rank could not make its cache.
        """
        self._check_open()
        if self._parts is not None:
            return
        model = self._model
        release = hold(model.tp, "generating")
        try:
            slots, snapshots = self._agree_on_slots(at_most)
            with model.tp.agreed():
                cache = model.new_cache(slots + snapshots)
        except BaseException:
            release()
            raise
        self._let_go = weakref.finalize(self, release)  # a dropped engine lets go as well
        self.max_batch_size = slots
        runner = self._runner(cache, slots, snapshots)
        vocab_size, usable, cut = model.config.vocab_size, self._builder.usable, None
        if runner.logits_are_cut:
            cut = CutVocabulary.of(model.tp, vocab_size, usable)
        sampler = Sampler(slots + snapshots, vocab_size, usable, model.device, cut=cut)
        self._parts, self._captured = (cache, runner, sampler), runner.captured
        if snapshots:
            self._reuse = PrefixReuse(cache, slots, snapshots, self._cache_config.mamba_block_size)

    def _runner(self, cache: Cache, slots: int, snapshots: int) -> Runner:
        device, limit, ladder, capture = self._model.device, self.max_prefill_tokens, None, None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            if self._capturing:
                ladder, capture = Ladder(slots, limit), CudaCapture(device)
        return Runner(
            self._model,
            cache,
            slots + snapshots,
            limit,
            ladder=ladder,
            capture=capture,
            check_steps=self._check_steps,
            cut_logits=not self._gather_logits,
        )

    def _agree_on_slots(self, at_most: int | None) -> tuple[int, int]:
        """Slots for sequences that run, and for snapshots, which take what those leave of the memory, or a quarter."""
        model, asked = self._model, self.max_batch_size

        def room_for(sequences: int) -> Limits:
            return agree_on_limits(
                model.tp,
                Needs.of(model, captures=self._capturing),
                device=model.device,
                max_batch_size=sequences,
                max_prefill_tokens=self.max_prefill_tokens,
                fraction=self._memory_fraction,
            )

        limits = room_for(min(asked or at_most or MAX_BATCH_SIZE, at_most or asked or MAX_BATCH_SIZE))
        lowered = asked is not None or limits.max_prefill_tokens < self.max_prefill_tokens
        if limits.note is not None and lowered and model.tp.rank == 0:
            warnings.warn(limits.note, ClampedWarning, stacklevel=3)
        self.max_prefill_tokens = self._scheduler.max_prefill_tokens = limits.max_prefill_tokens
        running = limits.max_batch_size
        if not self._cache_config.enable_prefix_caching:
            return running, 0
        fits = room_for(running + MAX_SNAPSHOTS).max_batch_size
        running = min(running, max(1, fits - fits // 4))
        return running, max(1, fits - running)

    @property
    def prefixes(self) -> PrefixCache | None:
        """The states that are kept for prompts to come; None without prefix caching, or before the start."""
        return None if self._reuse is None else self._reuse.prefixes

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens so far that were not computed, since a kept state stood for them."""
        return self._reused if self._reuse is None else self._reuse.prefixes.hit_tokens

    def save_prefixes(self, folder: str | os.PathLike[str]) -> int:
        """Write the kept states into ``folder``, for any number of ranks to load; every rank calls this.

        Returns:
            How many were written.

        Raises:
            ValueError: prefix caching is off, or the engine is closed.
            OSError: a file cannot be written; what ``folder`` held before stays readable.
            RankFailedError: rank 0 could not write it.
        """
        return save_prefixes(*self._kept_prefixes(), folder)

    def load_prefixes(self, folder: str | os.PathLike[str]) -> int:
        """Take over what :meth:`save_prefixes` wrote, those used last where not all fit; every rank calls this.

        Returns:
            How many were taken.

        Raises:
            ValueError: prefix caching is off, the engine is closed, or a file is missing, damaged or of another model.
            RankFailedError: another rank could not read its part.
        """
        return load_prefixes(*self._kept_prefixes(), folder)

    def _kept_prefixes(self) -> tuple[PrefixCache, Any]:
        if not self._cache_config.enable_prefix_caching:
            raise ValueError(
                "this engine keeps no prefixes: make it with cache_config=CacheConfig(enable_prefix_caching=True)"
            )
        self.start()
        assert self._reuse is not None and self._parts is not None  # noqa: PT018
        return self._reuse.prefixes, self._parts[0]

    def step(self) -> list[TokenEvent]:
        """The events of one forward pass: one for each request that made a token in it, or failed.

        A request whose logits are not finite ends alone, with ``finish_reason="error"``; the others go on. With
        ``overlap`` the pass after it is launched first.

        Returns:
            Events of the requests that were decoding, then of those whose prompts are now complete, each in order of
            arrival; none while a long prompt is being taken in, or without work.

        Raises:
            Exception: whatever a model, a tokenizer or an interrupt raises. The engine is then closed, every slot free:
                how far its sequences have come cannot be told.
        """
        self.start()
        if not self._requests:
            self._pending.clear()  # what is left of it belongs to sequences that have ended
            return []
        try:
            with self._on_stream(), torch.inference_mode():
                while len(self._pending) <= self._ahead and self._launch():
                    pass
            return self._collect(self._pending.popleft()) if self._pending else []
        except BaseException:
            self._pending.clear()  # not waited for: the device, or another rank, may have failed
            self.close()
            raise

    def _launch(self) -> bool:
        """Launch the next pass; False if there is nothing to run."""
        assert self._parts is not None
        cache, runner, sampler = self._parts
        reuse = self._reuse
        schedule: Schedule = self._scheduler.schedule(cache if reuse is None else reuse, reuse)
        if schedule.is_empty:
            return False
        for request in schedule.admitted:
            sampler.begin(request)
        logits, requests = runner.forward(schedule), schedule.sampling
        if reuse is not None:
            reuse.keep_cuts(schedule)
        self._pending.append(
            _Step(requests, runner.give(sampler.sample(logits, requests)) if requests else list)
        )
        for request in requests:
            request.launched += 1
            if request.all_launched:
                self._scheduler.remove(request)
                if reuse is None:  # else it is kept, once its tokens are known
                    self._release(request)
        return True

    def _collect(self, step: _Step) -> list[TokenEvent]:
        """Wait for the tokens of ``step``, and tell what has become of its requests."""
        events = []
        for request, token in zip(step.requests, step.receive(), strict=True):
            if request.index not in self._requests:
                continue  # it has ended, or was dropped, after this step was launched
            event = request.fail(_not_finite(request)) if token == NOT_FINITE else request.accept(token)
            events.append(event)
            if event.finish_reason is not None:
                self._remove(request)
        return events

    def abort(self, index: int) -> bool:
        """Drop the request with this id, wherever it is: it makes no more events, and its slot is free.

        Returns:
            Whether it was still waiting or running.
        """
        request = self._requests.get(index)
        if request is not None:
            self._remove(request)
        return request is not None

    def close(self) -> None:
        """Drop every request and give the state's memory back; a second call does nothing."""
        for request in list(self._requests.values()):
            self._remove(request)
        for step in self._pending:  # the device is done with what goes now
            with suppress(RuntimeError):
                step.receive()
        self._pending.clear()
        if self._reuse is not None:
            self._reused = self.reused_tokens
            self._reuse.prefixes.clear()
        self._closed, self._parts, self._reuse = True, None, None
        self._let_go()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remove(self, request: Request) -> None:
        del self._requests[request.index]
        if not request.all_launched:
            self._scheduler.remove(request)
        if not request.all_launched or self._reuse is not None:
            self._release(request)

    def _release(self, request: Request) -> None:
        """No further step is for ``request``: its slot is for others, and what is launched for it comes before them."""
        if request.slot is None or self._parts is None:
            return
        if self._reuse is None:
            self._parts[0].free(request.slot)
        elif request.finish_reason in ("length", "eos", "stop"):
            self._reuse.keep_text(request)
        else:
            self._reuse.free(request.slot)

    def _on_stream(self) -> AbstractContextManager[object]:
        """All steps run on the stream that was current at the start, whichever thread asks for them."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine is closed: make a new one")


def _not_finite(request: Request) -> str:
    return (
        f"the logits of new token {len(request.token_ids)} are not finite, so the weights are damaged or their "
        "dtype is too narrow: try float32"
    )
