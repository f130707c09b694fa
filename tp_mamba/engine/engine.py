"""The engine: requests come and go, and every step makes one more token of each that is running."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tp_mamba.engine.graphs import CaptureReport
from tp_mamba.engine.intake import RequestBuilder, checked_limit, params_of
from tp_mamba.engine.memory import MEMORY_FRACTION, checked_fraction
from tp_mamba.engine.model import Model, gives_hidden_states
from tp_mamba.engine.params import SamplingParams, integer
from tp_mamba.engine.request import Request, TokenEvent
from tp_mamba.engine.room import agree_on_room
from tp_mamba.engine.scheduler import Scheduler
from tp_mamba.engine.shared import gathered
from tp_mamba.engine.steps import Steps
from tp_mamba.options import CacheConfig
from tp_mamba.parallel.turns import hold
from tp_mamba.state.prefix import PrefixCache, common_length
from tp_mamba.state.prefix_files import load_prefixes, save_prefixes


class Engine:
    """Continues requests together, each with parameters of its own, on a state cache of its own.

    Each of its parts has a file: :class:`Scheduler` decides which requests advance, :class:`Steps` launches that:
    its :class:`Runner` makes one forward pass of it, its :class:`Sampler` turns logits into tokens. A request's tokens
    do not depend on the requests beside it, as far as the model's logits do not.

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
        self._model = model
        self._builder = RequestBuilder(model.config, tokenizer)
        self._scheduler = Scheduler(self.max_prefill_tokens)
        self._requests: dict[int, Request] = {}
        self._added = 0
        self._closed = False
        self._steps: Steps | None = None
        self._captured, self._reused = CaptureReport(), 0
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
            The request's id, the ``index`` of its events: 0 for the first request, then 1, and so on. With ``params.n``
            samples it is the id of the first; each further one has the next.

        Raises:
            ValueError: an empty prompt, ids that are no integers or outside the vocabulary, stop strings without a
                tokenizer, a position out of range, or a closed engine.
        """
        return self.add_alike([prompt], params, position=position)[0]

    def add_alike(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        position: int = 0,
    ) -> range:
        """As :meth:`add_request`, for prompts that begin with the same tokens: those are computed once.

        That is worth a step if it spares 32 tokens, and needs two slots. It is exact: each goes on from a copy of one
        state. No prefix caching is needed for it, and none is in its way.

        Args:
            prompts: the token ids of each.
            params: of all prompts, or of each.
            position: the same for all.

        Returns:
            The ids of the requests, in the order of the prompts, samples of one prompt next to each other.
        """
        self._check_open()
        if not 0 <= integer("position", position) < 2**64:
            raise ValueError(f"position={position} is out of range: it lies between 0 and 2**64 - 1")
        each_params = params_of(params, {}, len(prompts))
        requests = [
            request
            for prompt, its_params in zip(prompts, each_params, strict=True)
            for request in self._samples(prompt, its_params, int(position))
        ]
        if not requests:
            raise ValueError("the list of prompts is empty: give at least one")
        for index, request in enumerate(requests, self._added):
            request.index = index
            self._requests[index] = request
        self._added += len(requests)
        alike = _beginning(prompts) if len(requests) > 1 else 0
        for request in gathered(requests, alike):
            self._scheduler.add(request)
        return range(self._added - len(requests), self._added)

    def _samples(self, prompt: Sequence[int], params: SamplingParams, position: int) -> list[Request]:
        """One request for each of ``params.n`` samples of ``prompt``."""
        if params.prompt_logprobs is not None and not gives_hidden_states(self._model):
            raise ValueError(
                f"prompt_logprobs was given, and a {type(self._model).__name__} cannot score prompts: leave it out, or "
                "give the model forward_hidden() and logits()"
            )
        first = self._builder.build(self._added, prompt, params, position)
        rest = (
            self._builder.build(self._added, first.prompt, params, position, sample)
            for sample in range(1, params.n)
        )
        return [first, *rest]

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._requests)

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are running, each with a slot, and how many wait for one."""
        return self._scheduler.load

    @property
    def captured(self) -> CaptureReport:
        """How many steps were captured so far, and in what time."""
        return self._captured if self._steps is None else self._steps.captured

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
        if self._steps is not None:
            return
        model, config = self._model, self._cache_config
        release = hold(model.tp, "generating")
        try:
            room = agree_on_room(
                model,
                asked=self.max_batch_size,
                at_most=at_most,
                max_prefill_tokens=self.max_prefill_tokens,
                fraction=self._memory_fraction,
                captures=self._capturing,
                keeps_states=config.enable_prefix_caching,
            )
            with model.tp.agreed():
                cache = model.new_cache(room.slots)
        except BaseException:
            release()
            raise
        self._let_go = weakref.finalize(self, release)  # a dropped engine lets go as well
        self.max_batch_size = room.sequences
        self.max_prefill_tokens = self._scheduler.max_prefill_tokens = room.max_prefill_tokens
        self._scheduler.max_contexts = room.sequences - 1 if hasattr(cache, "copy") else 0
        self._steps = Steps(
            model,
            self._scheduler,
            cache,
            room,
            usable=self._builder.usable,
            ahead=self._ahead,
            capturing=self._capturing,
            check_steps=self._check_steps,
            cut_logits=not self._gather_logits,
            block_size=config.mamba_block_size,
        )

    @property
    def prefixes(self) -> PrefixCache | None:
        """The states that are kept for prompts to come; None without prefix caching, or before the start."""
        reuse = None if self._steps is None else self._steps.reuse
        return None if reuse is None else reuse.prefixes

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens so far that were not computed, since a kept state stood for them."""
        return self._reused if self.prefixes is None else self.prefixes.hit_tokens

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
        assert self._steps is not None and self.prefixes is not None  # noqa: PT018
        return self.prefixes, self._steps.cache

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
        assert self._steps is not None
        if not self._requests:
            self._steps.forget()
            return []
        try:
            events = []
            for request, event in self._steps.run(self._requests):
                events.append(event)
                if event.finish_reason is not None:
                    self._remove(request)
            return events
        except BaseException:
            if self._steps is not None:
                self._steps.forget()  # not waited for: the device, or another rank, may have failed
            self.close()
            raise

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
        if self._steps is not None:
            self._captured, self._reused = self.captured, self.reused_tokens
            self._steps.close()
        self._closed, self._steps = True, None
        self._let_go()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remove(self, request: Request) -> None:
        del self._requests[request.index]
        if self._steps is None:
            self._scheduler.remove(request)
        else:
            self._steps.remove(request)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine is closed: make a new one")


def _beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all ``prompts`` begin with together."""
    first = np.asarray(prompts[0], np.int64)
    return min(common_length(first, np.asarray(prompt, np.int64)) for prompt in prompts)
