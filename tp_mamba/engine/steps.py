"""The steps of an engine on one cache: launched one after another, and their tokens waited for later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch

from tp_mamba.engine.buffers import to_host
from tp_mamba.engine.choice import NOT_FINITE
from tp_mamba.engine.cut_vocabulary import CutVocabulary
from tp_mamba.engine.graphs import CaptureReport, CudaCapture
from tp_mamba.engine.ladder import Ladder
from tp_mamba.engine.model import Cache, Model
from tp_mamba.engine.prompt_scores import Asked, PromptScorer, PromptScores
from tp_mamba.engine.request import Request, TokenEvent
from tp_mamba.engine.reuse import PrefixReuse
from tp_mamba.engine.room import Room
from tp_mamba.engine.runner import Runner
from tp_mamba.engine.sampler import Sampler
from tp_mamba.engine.scheduler import Schedule, Scheduler
from tp_mamba.engine.token_logprob import described


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was launched, and whose tokens may still be on their way."""

    requests: list[Request]
    """Those that make a token in it."""
    receive: Callable[[], list[int]]
    """Waits for the tokens."""
    scores: Callable[[], list[list[float]]]
    """Waits for the scores of those tokens whose requests ask for them."""
    prompts: PromptScores | None
    """Those of tokens of prompts."""


class Steps:
    """Runs what a scheduler decides; the host is up to ``ahead`` steps in front of the tokens that it has seen.

    Attributes:
        cache: the states.
        reuse: what keeps states for prompts to come; None without prefix caching.
        captured: how many steps were captured so far, and in what time.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        cache: Cache,
        room: Room,
        *,
        usable: int,
        ahead: int,
        capturing: bool,
        check_steps: bool,
        cut_logits: bool,
        block_size: int | None,
    ) -> None:
        """For a ``cache`` of ``room.slots`` slots.

        Args:
            usable: ids at or above it are never made.
            ahead: steps that may be launched before the tokens of the oldest are waited for.
            capturing: capture steps in CUDA graphs.
            check_steps: compare every index of a step with what it may be, before it runs.
            cut_logits: leave each rank its own columns of the logits, where the model can.
            block_size: tokens between two snapshots of a long prompt, by default 2048.
        """
        self.cache, self._scheduler, self._ahead = cache, scheduler, ahead
        device, ladder, capture = model.device, None, None
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if capturing:
            ladder, capture = Ladder(room.sequences, room.max_prefill_tokens), CudaCapture(device)
        self._runner = Runner(
            model,
            cache,
            room.slots,
            room.max_prefill_tokens,
            ladder=ladder,
            capture=capture,
            check_steps=check_steps,
            cut_logits=cut_logits,
            scorer=PromptScorer(model, usable),
        )
        vocab_size, cut = model.config.vocab_size, None
        if self._runner.logits_are_cut:
            cut = CutVocabulary.of(model.tp, vocab_size, usable)
        self._sampler = Sampler(room.slots, vocab_size, usable, device, cut=cut)
        self.reuse: PrefixReuse | None = None
        if room.snapshots:
            self.reuse = PrefixReuse(cache, room.sequences, room.snapshots, block_size)
        self._pending: deque[_Step] = deque()

    @property
    def captured(self) -> CaptureReport:
        """How many steps were captured so far, and in what time."""
        return self._runner.captured

    @property
    def in_flight(self) -> int:
        """Steps that were launched, and whose tokens were not waited for."""
        return len(self._pending)

    def run(self, requests: Mapping[int, Request]) -> list[tuple[Request, TokenEvent]]:
        """Launch what may be launched, and wait for the oldest step: what has become of those of ``requests`` in it."""
        with self._on_stream(), torch.inference_mode():
            while len(self._pending) <= self._ahead and self._launch():
                pass
        return self._collect(self._pending.popleft(), requests) if self._pending else []

    def _launch(self) -> bool:
        """Launch the next pass; False if there is nothing to run."""
        reuse, sampler = self.reuse, self._sampler
        schedule: Schedule = self._scheduler.schedule(self.cache if reuse is None else reuse, reuse)
        if schedule.is_empty:
            return False
        for request in schedule.admitted:
            sampler.begin(request)
        runner, requests, asked, prompts = self._runner, schedule.sampling, Asked.of(schedule), None
        if asked.parts:
            logits, prompts = runner.forward_scoring(schedule, asked)
        else:
            logits = runner.forward(schedule)
        if reuse is not None:
            reuse.keep_cuts(schedule)
        receive: Callable[[], list[int]] = list
        scores: torch.Tensor | None = None
        if requests:
            tokens = sampler.sample(logits, requests)
            scores, receive = sampler.score(logits, tokens, requests), runner.give(tokens)
        self._pending.append(_Step(requests, receive, list if scores is None else to_host(scores), prompts))
        for request in requests:
            request.launched += 1
            if request.all_launched:
                self._scheduler.remove(request)
                if reuse is None:  # else it is kept, once its tokens are known
                    self._release(request)
        return True

    @staticmethod
    def _collect(step: _Step, requests: Mapping[int, Request]) -> list[tuple[Request, TokenEvent]]:
        """Wait for the tokens of ``step``, and tell what has become of its requests."""
        found = []
        if step.prompts is not None:
            step.prompts.hand_out()
        scores = iter(step.scores())
        for request, token in zip(step.requests, step.receive(), strict=True):
            logprob, top = None, request.params.logprobs
            if top is not None:
                logprob = described(next(scores), token, top)
            if request.index not in requests:
                continue  # it has ended, or was dropped, after this step was launched
            finite = token != NOT_FINITE
            event = request.accept(token, logprob) if finite else request.fail(_not_finite(request))
            found.append((request, event))
        return found

    def remove(self, request: Request) -> None:
        """No further step is for ``request``, which has ended or was dropped."""
        if not request.all_launched:
            context = self._scheduler.remove(request)
            if context is not None:
                self._release(context)
        if not request.all_launched or self.reuse is not None:
            self._release(request)

    def _release(self, request: Request) -> None:
        """Its slot is for others, and what is launched for it comes before them."""
        if request.slot is None:
            return
        if self.reuse is None:
            self.cache.free(request.slot)
        elif request.finish_reason in ("length", "eos", "stop"):
            self.reuse.keep_text(request)
        else:
            self.reuse.free(request.slot)

    def forget(self) -> None:
        """Do not wait for what is in flight: it belongs to sequences that have ended, or something has failed."""
        self._pending.clear()

    def close(self) -> None:
        """Wait for what is in flight, and give up the states that were kept."""
        for step in self._pending:  # the device is done with what goes now
            with suppress(RuntimeError):
                step.receive()
        self._pending.clear()
        if self.reuse is not None:
            self.reuse.prefixes.clear()

    def _on_stream(self) -> AbstractContextManager[object]:
        """All steps run on the stream that was current at the start, whichever thread asks for them."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _not_finite(request: Request) -> str:
    return (
        f"the logits of new token {len(request.token_ids)} are not finite, so the weights are damaged or their "
        "dtype is too narrow: try float32"
    )
