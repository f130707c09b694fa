"""OpenAI's answers: what a text has become, as one object or as the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from tp_mamba.engine.request import TokenEvent

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
        """A piece of a stream; None if it says nothing."""

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """A choice of an answer in one piece."""

    def body(self, choices: list[dict[str, Any]], usage: Usage | None, *, stream: bool) -> dict[str, Any]:
        """The object around choices."""


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
    echoes: list[str] | None = None
    """With ``echo`` the prompts' texts by choice."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The prompt, where it is asked for."""
        if self.echoes is None:
            return None
        return {"index": choice, "text": self.echoes[choice], "logprobs": None, "finish_reason": None}

    def piece(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Its text."""
        if not piece.text and piece.finish_reason is None:
            return None
        return {
            "index": choice,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """Its text, behind the prompt where that is asked for."""
        echo = "" if self.echoes is None else self.echoes[choice]
        return {
            "index": choice,
            "text": echo + piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }

    def body(self, choices: list[dict[str, Any]], usage: Usage | None, *, stream: bool) -> dict[str, Any]:
        """A ``text_completion``, of a stream as well."""
        return self.head.body("text_completion", choices, usage)


@dataclass(slots=True)
class ChatShape:
    """``/v1/chat/completions``."""

    head: Head

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Its text."""
        if not piece.text and piece.finish_reason is None:
            return None
        delta = {"content": piece.text} if piece.text else {}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": piece.finish_reason}

    def whole(self, choice: int, piece: Piece) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": choice, "message": message, "logprobs": None, "finish_reason": piece.finish_reason}

    def body(self, choices: list[dict[str, Any]], usage: Usage | None, *, stream: bool) -> dict[str, Any]:
        """A ``chat.completion``, or a chunk of one."""
        return self.head.body("chat.completion.chunk" if stream else "chat.completion", choices, usage)


def event_of(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"
