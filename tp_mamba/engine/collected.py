"""What the events of one request add up to."""

from __future__ import annotations

from dataclasses import dataclass, field

from tp_mamba.engine.request import FinishReason, TokenEvent
from tp_mamba.engine.token_logprob import TokenLogprob


@dataclass(slots=True)
class Collected:
    """Takes a request's events, in order."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    """The text, as it came."""
    finish_reason: FinishReason | None = None
    """None while more events are to come."""
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None
    """One for each token, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)

    def take(self, event: TokenEvent) -> None:
        """Add ``event``."""
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
        if event.logprob is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs.append(event.logprob)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.pieces.append(event.text)
        self.finish_reason, self.error = event.finish_reason, event.error
