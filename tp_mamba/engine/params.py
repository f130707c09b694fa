"""How to choose the next token, and when to stop."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, SupportsFloat, SupportsIndex

MAX_BIAS = 100.0
"""Largest size of a value of ``logit_bias``, as in OpenAI's interface."""

MAX_LOGPROBS = 20
"""Likeliest tokens that are listed at one place; vLLM's default limit, and OpenAI's for chats."""

MAX_SAMPLES = 128
"""Largest ``n``, as in OpenAI's interface."""

_MIN_TEMPERATURE = 1e-6  # below it the quotient of two logits leaves what a float can tell apart

_INTEGERS = (
    "max_new_tokens",
    "top_k",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "prompt_logprobs_start",
    "n",
    "seed",
)
_OPTIONAL = ("logprobs", "prompt_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one prompt is continued, checked when it is made.

    Sampling defaults that a checkpoint recommends (``generation_config.json``) are not applied: what is written
    here is what happens. Only its end-of-text ids count, as part of the model's configuration.

    The names are vLLM's, and so is the order: ``logit_bias`` and ``min_tokens``, then the repetition, frequency and
    presence penalties, then the filters, which keep what transformers' logits processors keep: temperature, top-k,
    top-p, min-p. At temperature 0 the likeliest token wins whatever the last three say, since each of them keeps it.
    """

    max_new_tokens: int = 128
    """Tokens after which a sequence ends, at least 1."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy, otherwise at least 1e-6."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum, in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens already in prompt or text, multiplies the negative; above 0."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the text holds (the prompt does not count), in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token once for each time that the text holds it, in [-2, 2]."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of these ids, each in [-100, 100]; kept as pairs, in order of id."""
    min_tokens: int = 0
    """Tokens that are made before any may end the text: neither end-of-text nor stop ids are chosen until then, and
    what they spell is not searched for stop strings."""
    logprobs: int | None = None
    """Give the logarithm of each new token's probability, and so many of the likeliest tokens' there, at most 20; None
    for none. They are the model's own, before penalties, biases and temperature."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, given with the first new one."""
    prompt_logprobs_start: int = 0
    """Index of the first prompt token that ``prompt_logprobs`` is about; what lies before may come from kept states."""
    n: int = 1
    """Samples of the prompt, which is computed once for all of them; each has random numbers of its own."""
    seed: int = 0
    """Together with the prompt's position in the call it fixes the prompt's random numbers; 0 to 2^64 - 1."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a sequence, besides the model's end-of-text ids."""
    stop: tuple[str, ...] = ()
    """Strings that end a sequence; neither they nor anything after them is part of the text."""
    ignore_eos: bool = False
    """Go on after the model's end-of-text ids."""

    def __post_init__(self) -> None:
        self._convert()
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} makes nothing: ask for at least 1")
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} is out of range: use 0 for greedy, or a finite number of at "
                f"least {_MIN_TEMPERATURE}"
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k={self.top_k} is negative: use 0 to keep every token, or a positive count"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} is out of range: it lies above 0 and at most at 1 (1 keeps all)"
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is out of range: it lies between 0 (keeps all) and 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} is out of range: it is a finite number "
                "above 0 (1 for none)"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(
                    f"{name}={getattr(self, name)} is out of range: it lies between -2 and 2 (0 for none)"
                )
        for token, bias in self.bias_pairs:
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise ValueError(
                    f"logit_bias of id {token} is {bias}: it lies between {-MAX_BIAS:g} and {MAX_BIAS:g}"
                )
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is out of range: it lies between 0 and "
                f"max_new_tokens={self.max_new_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
                raise ValueError(
                    f"{name}={asked} is out of range: list 0 to {MAX_LOGPROBS} of the likeliest tokens, or None for no "
                    "logprobs at all"
                )
        if not 1 <= self.n <= MAX_SAMPLES:
            raise ValueError(f"n={self.n} is out of range: ask for 1 to {MAX_SAMPLES} samples of a prompt")
        if self.prompt_logprobs_start < 0:
            raise ValueError(
                f"prompt_logprobs_start={self.prompt_logprobs_start} is negative: it counts from the first token"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is out of range: it lies between 0 and 2**64 - 1")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every text contains: leave it out")

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as it is kept."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    def _convert(self) -> None:
        """Give every field its plain Python type, and refuse what has another."""
        for name in _INTEGERS:
            if getattr(self, name) is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, integer(name, getattr(self, name)))
        for name in _NUMBERS:
            object.__setattr__(self, name, number(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if not isinstance(self.stop_token_ids, Iterable):
            raise ValueError(
                f"stop_token_ids={self.stop_token_ids!r} is one value: give a tuple of ids, as in (0,)"
            )
        ids = tuple(integer("an id of stop_token_ids", token) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        if isinstance(self.stop, str):
            raise ValueError(
                f"stop={self.stop!r} is one string: give a tuple of strings, as in ({self.stop!r},)"
            )
        if not isinstance(self.stop, Iterable):
            raise ValueError(f"stop={self.stop!r} holds no strings: give a tuple of them, () for none")
        stop = tuple(self.stop)
        for string in stop:
            if not isinstance(string, str):
                raise ValueError(
                    f"stop holds {string!r}, which is not a string: give strings, or ids as stop_token_ids"
                )
        object.__setattr__(self, "stop", stop)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}: give True or False")


def with_options(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """``params`` (the defaults for None) with the fields of ``options`` in place of its own.

    Raises:
        ValueError: ``params`` is something else, an option is no field of :class:`SamplingParams`, or its value is
            refused there.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise ValueError(
            f"params is {params!r}: give SamplingParams(...), one for each prompt in a list, or keywords"
        )
    names = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in names:
            raise ValueError(f"{name} is no option of generation: there are {', '.join(names)}")
    if params is not None and not options:
        return params
    return replace(params or SamplingParams(), **options)


def _pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """A ``logit_bias`` as pairs; ids may be strings of digits, as JSON has no other keys."""
    pairs = list(bias.items()) if isinstance(bias, Mapping) else bias
    try:
        pairs = [(token, value) for token, value in pairs]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(
            f"logit_bias is {bias!r}: give a mapping of ids to numbers, as in {{11: -100.0}}"
        ) from None
    found: dict[int, float] = {}
    for token, value in pairs:
        is_text = isinstance(token, str) and token.isascii() and token.isdecimal()
        id_ = integer("an id of logit_bias", int(token) if is_text else token)
        if id_ in found:
            raise ValueError(f"logit_bias holds the id {id_} twice: give it once")
        found[id_] = number(f"logit_bias of id {id_}", value)
    return tuple(sorted(found.items()))


def integer(what: str, value: SupportsIndex) -> int:
    """``value`` as an int: numpy's and torch's integer scalars count, floats and booleans do not.

    Raises:
        ValueError: it is no integer; the sentence begins with ``what``.
    """
    if type(value) is int:  # of a long prompt, every token
        return value
    try:
        if "bool" in str(getattr(value, "dtype", type(value))):  # operator.index would make 0 or 1 of it
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} is {value!r}, which is not an integer: give a whole number") from None


def number(what: str, value: SupportsFloat) -> float:
    """``value`` as a float: ints, and the scalars of numpy and torch count; strings and booleans do not.

    Raises:
        ValueError: it is no number; the sentence begins with ``what``.
    """
    try:
        if isinstance(value, (str, bytes)) or "bool" in str(getattr(value, "dtype", type(value))):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{what} is {value!r}, which is not a number: give one, as in 0.5") from None
