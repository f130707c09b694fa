"""What clients send: the fields of OpenAI's requests that this server serves, and vLLM's names for what goes beyond.

A field that changes the answer is served or refused, never passed over; so are fields that nobody knows.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from tp_mamba.engine.params import SamplingParams

MAX_CHOICES = 128
"""Texts of one prompt (``n``), as OpenAI has it."""

MAX_PROMPTS = 2048
"""Prompts of one request."""

MAX_STOPS = 16
"""Stop strings of one request."""

MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that are told beside a chosen one."""

_UNSIGNED = 2**64

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A JSON object; strings are no numbers in it, and numbers no booleans."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None
    """OpenAI's padding against listeners; there is none here."""


class Sampling(Body):
    """The fields that completions and chat completions share."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=_UNSIGNED)
    stop: _Stop | list[_Stop] | None = None
    temperature: float | None = Field(default=1.0, ge=0, le=100)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    """Who asks, for the server's own use: there is none."""
    # vLLM's:
    top_k: int | None = Field(default=0, ge=-1)
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(default=1.0, gt=0, le=100)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    min_tokens: int | None = Field(default=0, ge=0)
    add_special_tokens: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"stop holds {len(value)} strings: give at most {MAX_STOPS}")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options was given without a stream: leave it out, or set stream to true")
        return self

    def sampling_params(self, max_new_tokens: int, **more: Any) -> SamplingParams:
        """How the engine is to continue the prompts; without a seed another text every time.

        Raises:
            ValueError: a value that :class:`SamplingParams` refuses.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed % _UNSIGNED
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            n=self.choices,
            max_new_tokens=max_new_tokens,
            temperature=_or(self.temperature, 1.0),
            top_k=max(0, _or(self.top_k, 0)),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},  # type: ignore[arg-type]  # it takes ids that are strings of digits
            min_tokens=_or(self.min_tokens, 0),
            seed=seed,
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            **more,
        )

    @property
    def choices(self) -> int:
        """Texts of each prompt."""
        return _or(self.n, 1)

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends in the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: Any
    """A text, texts, token ids, or lists of token ids."""
    max_tokens: int | None = Field(default=16, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError(
                "suffix was given, and this model continues a text, it fills no gap: leave it out"
            )
        return value

    @model_validator(mode="after")
    def _no_best_of(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError(
                "max_tokens=0 without echo asks for nothing: ask for a token, or set echo to true"
            )
        if self.best_of not in (None, self.choices):
            raise ValueError(f"best_of={self.best_of} is not served: leave it out, and ask for n texts")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or token ids.

        Raises:
            ValueError: ``prompt`` is something else, or none; the ids themselves are checked with the vocabulary.
        """
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not isinstance(given, list) or not given:
            raise ValueError(
                "prompt holds no text: give a string, a list of strings, token ids, or lists of those"
            )
        if type(given[0]) is int:
            given = [given]
        if len(given) > MAX_PROMPTS:
            raise ValueError(f"prompt holds {len(given)} prompts: give at most {MAX_PROMPTS} in one request")
        kind = type(given[0])
        if kind not in (str, list) or any(type(one) is not kind for one in given):
            raise ValueError(
                "prompt mixes kinds: give a string, a list of strings, token ids, or lists of those"
            )
        return given


class Message(Body):
    """A turn of a conversation."""

    role: str
    content: str | list[Any] | None = None
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: the text as one string.

        Raises:
            ValueError: a part of the content is no text.
        """
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if isinstance(self.content, list):
            texts = []
            for part in self.content:
                if not (
                    isinstance(part, dict)
                    and part.get("type") == "text"
                    and isinstance(part.get("text"), str)
                ):
                    raise ValueError(
                        'a part of a message is no text, and this model reads nothing else: give {"type": "text", '
                        '"text": ...}'
                    )
                texts.append(part["text"])
            turn["content"] = "".join(texts)
        return turn | ({} if self.name is None else {"name": self.name})


class ResponseFormat(Body):
    """``response_format``."""

    type: str


class ChatBody(Sampling):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_PROMPTS)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = True

    @model_validator(mode="after")
    def _what_is_not_served(self) -> Self:
        if self.tools or self.tool_choice not in (None, "none"):
            raise ValueError("tools are not served: leave tools and tool_choice out")
        if self.response_format is not None and self.response_format.type != "text":
            raise ValueError(f"response_format {self.response_format.type!r} is not served: leave it out")
        if self.store:
            raise ValueError("store=true is not served, nothing is kept here: leave it out")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(
                "top_logprobs was given without logprobs: set logprobs to true, or leave both out"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """New tokens at most; None where the request leaves it to the server."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(Body):
    """``POST /tokenize``, as vLLM has it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages to be tokenized")
        return self


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
