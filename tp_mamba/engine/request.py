"""One prompt from its arrival to its end: what of it was taken in, what it has made, and why it ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.token_logprob import TokenLogprob
from tp_mamba.engine.uniforms import UniformStream
from tp_mamba.text.detokenizer import Detokenizer
from tp_mamba.text.stop_strings import StopStrings

FinishReason = Literal["length", "eos", "stop", "error"]
"""``max_new_tokens`` were made; the model's end of text; a stop id or string; the event's ``error``."""


class RequestState(Enum):
    """Where a request is on its way; it only ever moves forward."""

    WAITING = auto()
    """It has no slot yet."""
    PREFILLING = auto()
    """It has a slot, and part of its prompt is still to be taken in."""
    DECODING = auto()
    """Its prompt is in; every step makes one token."""
    FINISHED = auto()
    """It has ended; its slot belongs to others."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of one request, or the failure that ended it."""

    index: int
    """The request: in ``generate()`` and ``stream()`` the prompt's position in the call, else the id that
    ``Engine.add_request`` returned."""
    token_id: int | None
    """The token, end-of-text and stop tokens included; None for a failure, which makes none."""
    text: str
    """Text that has become certain with it: often that of this token, none while a character is unfinished or
    a stop string may be coming, more when the wait is over. Always empty without a tokenizer."""
    finish_reason: FinishReason | None
    """Why the sequence ended with this token; None while it goes on."""
    error: str | None = None
    """With ``finish_reason="error"``: what went wrong with this sequence, one sentence."""
    logprob: TokenLogprob | None = None
    """How likely the token was, where ``logprobs`` asked for it."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """With the first token, where ``prompt_logprobs`` asked for it: of each prompt token from
    ``prompt_logprobs_start`` on; None for the very first, before which there is nothing."""


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what was generated for it."""

    index: int
    """Names the request in its events."""
    prompt: Sequence[int]
    params: SamplingParams
    position: int = 0
    """Fixes its random numbers, together with the seed."""
    sample: int = 0
    """Which of the samples of its prompt it is; their random numbers differ."""
    eos_ids: Collection[int] = ()
    """End-of-text ids that end it."""
    detokenizer: Detokenizer | None = None
    """Makes text of its tokens; None for ids only."""
    slot: int | None = None
    """Its place in the state cache, once it has one; once :attr:`all_launched`, perhaps another's."""
    taken: int = 0
    """Prompt tokens whose effect is in the slot's state."""
    cuts: list[int] = field(default_factory=list)
    """Counts of prompt tokens, ascending, behind each of which the state is kept for other prompts."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens generated so far, as far as the host has seen them. The last one is not in the state yet."""
    scored: list[TokenLogprob] = field(default_factory=list)
    """Of those of :attr:`asked_about` that the host has seen the scores of."""
    launched: int = 0
    """Tokens that the steps launched so far make. Where the host runs ahead of the device, one more than it has seen,
    until the request ends."""
    finish_reason: FinishReason | None = None
    followers: list[Request] | None = None
    """Of a context (:mod:`tp_mamba.engine.shared`): those that have yet to begin with its state."""
    context: Request | None = None
    """What it begins with, until it has begun."""
    uniforms: UniformStream = field(init=False)
    stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self.uniforms = UniformStream(self.params.seed, self.position, self.sample)
        self.stops = StopStrings(self.params.stop)

    @property
    def remaining(self) -> int:
        """Prompt tokens still to be taken in."""
        return len(self.prompt) - self.taken

    @property
    def asked_about(self) -> range:
        """Indices of the prompt's tokens whose logarithms of probabilities are asked for."""
        if self.params.prompt_logprobs is None:
            return range(0)
        return range(max(1, self.params.prompt_logprobs_start), len(self.prompt))

    @property
    def reusable(self) -> int:
        """The most prompt tokens that a state may stand for with which this request begins: it computes the last token
        itself, and the one before each that is :attr:`asked_about`."""
        last = len(self.prompt)
        if self.params.prompt_logprobs is not None:
            last = min(last, max(1, self.params.prompt_logprobs_start))
        return last - 1

    @property
    def next_stop(self) -> int:
        """Prompt tokens that may be in after the next step: all, or as many as the next of :attr:`cuts` says."""
        return next((count for count in self.cuts if count > self.taken), len(self.prompt))

    @property
    def all_launched(self) -> bool:
        """Whether no further step is needed, since the step that makes the last token it may have is launched."""
        return self.launched == self.params.max_new_tokens

    @property
    def state(self) -> RequestState:
        """Where it is on its way."""
        if self.finish_reason is not None:
            return RequestState.FINISHED
        if self.slot is None:
            return RequestState.WAITING
        return RequestState.PREFILLING if self.remaining else RequestState.DECODING

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> TokenEvent:
        """Append ``token``; the event's ``finish_reason`` says whether the sequence ends with it."""
        of_prompt: tuple[TokenLogprob | None, ...] | None = None
        if self.params.prompt_logprobs is not None and not self.token_ids:
            first = (None,) if self.params.prompt_logprobs_start == 0 else ()
            of_prompt, self.scored = (*first, *self.scored), []
        self.token_ids.append(token)
        reason: FinishReason | None = None
        if token in self.eos_ids:
            reason = "eos"
        elif token in self.params.stop_token_ids:
            reason = "stop"
        silent = reason is not None  # a token that ends the text is no part of it
        if reason is None and len(self.token_ids) == self.params.max_new_tokens:
            reason = "length"
        text = ""
        if self.detokenizer is not None:
            text = "" if silent else self.detokenizer.push(token)
            early = len(self.token_ids) <= self.params.min_tokens
            text, stopped = self._filter(text, last=reason is not None, search=not early)
            if stopped:
                reason = "stop"
        self.finish_reason = reason
        return TokenEvent(self.index, token, text, reason, None, logprob, of_prompt)

    def fail(self, error: str) -> TokenEvent:
        """End here for the reason ``error``; what was made so far stands, and text still waiting comes out."""
        text = "" if self.detokenizer is None else self._filter("", last=True)[0]
        self.finish_reason = "error"
        return TokenEvent(self.index, None, text, "error", error)

    def _filter(self, text: str, *, last: bool, search: bool = True) -> tuple[str, bool]:
        """What of ``text`` may be given out now, and whether a stop string, if one is searched for, has ended it."""
        assert self.detokenizer is not None
        if last:
            text += self.detokenizer.flush()
        if not search:
            return text, False
        text = self.stops.push(text)
        if last and not self.stops.stopped:
            text += self.stops.flush()
        return text, self.stops.stopped
