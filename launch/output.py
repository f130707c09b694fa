"""Generated text on its way out: printed as it is made, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.console import end_line, write_generated

if TYPE_CHECKING:
    from tp_mamba.engine.request import TokenEvent


@dataclass(slots=True)
class Output:
    """Follows the stream of tokens on every rank, and prints them on the rank that speaks.

    One prompt: its text is printed, then each piece as it is made. Several: each one with its text, under its
    number, as soon as it is finished.
    """

    prompts: list[str]
    speaks: bool
    echo: bool = True
    """Print a prompt before its text."""
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    pieces: list[list[str]] = field(init=False)
    token_ids: list[list[int]] = field(init=False)
    reasons: list[str | None] = field(init=False)
    errors: list[str] = field(default_factory=list)
    """Why sequences failed, one sentence each."""

    def __post_init__(self) -> None:
        self.pieces = [[] for _ in self.prompts]
        self.token_ids = [[] for _ in self.prompts]
        self.reasons = [None] * len(self.prompts)

    def follow(self, events: Iterable[TokenEvent]) -> None:
        """Take every event, in order; an error on the way finds the line of text ended."""
        if self.speaks and self.echo and len(self.prompts) == 1:
            write_generated(self.prompts[0])
        try:
            for event in events:
                self._take(event)
        finally:
            end_line()

    def _take(self, event: TokenEvent) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.pieces[event.index].append(event.text or "")
        if event.token_id is not None:
            self.token_ids[event.index].append(event.token_id)
        if event.error is not None:
            self.errors.append(f"prompt {event.index + 1}: {event.error}")
        self.reasons[event.index] = event.finish_reason
        if self.speaks:
            self._print(event)

    def _print(self, event: TokenEvent) -> None:
        if len(self.prompts) == 1:
            write_generated((event.text or "") + ("\n" if event.finish_reason else ""))
        elif event.finish_reason:
            text = (self.prompts[event.index] if self.echo else "") + "".join(self.pieces[event.index])
            write_generated(f"[{event.index + 1}] {text}\n\n")

    def results(self) -> list[dict[str, Any]]:
        """One entry per prompt, in the order given."""
        columns = zip(self.prompts, self.pieces, self.token_ids, self.reasons, strict=True)
        return [
            {"prompt": prompt, "text": "".join(pieces), "token_ids": ids, "finish_reason": reason}
            for prompt, pieces, ids, reason in columns
        ]

    def timing(self) -> dict[str, Any]:
        """Seconds to the first token; the rate of those after each prompt's first, None if there are none."""
        first = self.last if self.first is None else self.first
        tokens = sum(map(len, self.token_ids))
        later, seconds = tokens - len(self.prompts), self.last - first
        return {
            "new_tokens": tokens,
            "prefill_seconds": first - self.started,
            "tokens_per_second": later / seconds if later > 0 and seconds > 0 else None,
        }
