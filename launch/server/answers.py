"""OpenAI's answers: what a text has become, as one object or as the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tp_mamba.engine.request import TokenEvent
from tp_mamba.launch.server.logprobs import Place, TokenTexts, of_chat, of_completion

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
"""The engine's word, and OpenAI's."""


@dataclass(slots=True)
class Piece:
    """What became of one choice, in a step or in several."""

    text: str = ""
    finish_reason: str | None = None
    events: list[TokenEvent] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        """Take what a step has brought."""
        self.text += event.text
        self.events.append(event)
        if event.finish_reason is not None:
            self.finish_reason = FINISH_REASONS[event.finish_reason]

    @property
    def tokens(self) -> int:
        """New tokens in it."""
        return sum(event.token_id is not None for event in self.events)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        """As OpenAI has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Shape(Protocol):
    """How the answers of one route look."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first piece of a stream's choice, before any token; None for none."""

    def piece(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """The next piece of a stream's choice; None if it says nothing."""

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """A choice of an answer in one piece."""

    def body(self, choices: list[dict[str, Any]], usage: Usage | None, *, stream: bool) -> dict[str, Any]:
        """The object around choices."""

    def new_tokens(self, piece: Piece) -> int:
        """Those that count."""


@dataclass(slots=True)
class Head:
    """What every object of one answer begins with."""

    model: str
    prefix: str
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(16)}"
        self.created = int(time.time())

    def body(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        """The object of ``kind``."""
        body = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return body if usage is None else body | {"usage": usage.body()}


@dataclass(slots=True)
class CompletionShape:
    """``/v1/completions``."""

    head: Head
    texts: TokenTexts
    echoes: Sequence[tuple[str, Sequence[int]]] | None = None
    """With ``echo`` the prompts by choice: text and ids."""
    logprobs: bool = False
    prompt_only: bool = False
    """Whether no new token was asked for. One is made all the same, and not shown."""
    _offsets: dict[int, int] = field(default_factory=dict)
    """Of the choices that have begun: where what comes next begins, in characters."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """A prompt comes with what is made first, since that is when its logprobs are known."""
        return None

    def piece(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Its text."""
        body = self.whole(choice, piece)
        says = body["text"] or body["finish_reason"] or (body["logprobs"] or {}).get("tokens")
        return body if says else None

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """Its text, behind the prompt where that is asked for."""
        first = choice not in self._offsets
        offset = self._offsets.setdefault(choice, 0)
        text = "" if self.prompt_only else piece.text
        places: list[Place] = []
        if first and self.echoes is not None:
            echo, ids = self.echoes[choice]
            text = echo + text
            scores = next((e.prompt_logprobs for e in piece.events if e.prompt_logprobs is not None), None)
            if scores is not None:
                places += zip(ids, scores, strict=True)
        if not self.prompt_only:
            places += [(e.logprob.token_id, e.logprob) for e in piece.events if e.logprob is not None]
        logprobs = None
        if self.logprobs:
            logprobs, self._offsets[choice] = of_completion(self.texts, places, offset)
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def body(self, choices: list[dict[str, Any]], usage: Usage | None, *, stream: bool) -> dict[str, Any]:
        """A ``text_completion``, of a stream as well."""
        return self.head.body("text_completion", choices, usage)

    def new_tokens(self, piece: Piece) -> int:
        """Those that are shown."""
        return 0 if self.prompt_only else piece.tokens


@dataclass(slots=True)
class ChatShape:
    """``/v1/chat/completions``."""

    head: Head
    texts: TokenTexts
    logprobs: bool = False

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Its text."""
        logprobs = self._logprobs(piece)
        if not (piece.text or piece.finish_reason or (logprobs and logprobs["content"])):
            return None
        delta = {"content": piece.text} if piece.text else {}
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """The message."""
        return {
            "index": choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def body(self, choices: list[dict[str, Any]], usage: Usage | None, *, stream: bool) -> dict[str, Any]:
        """A ``chat.completion``, or a chunk of one."""
        return self.head.body("chat.completion.chunk" if stream else "chat.completion", choices, usage)

    def new_tokens(self, piece: Piece) -> int:
        """All."""
        return piece.tokens

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return of_chat(self.texts, [event.logprob for event in piece.events if event.logprob is not None])


def event_of(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"
