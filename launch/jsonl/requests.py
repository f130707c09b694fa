"""The lines of a file of requests, and what each of them asks for. Nothing here imports torch."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from tp_mamba.engine.params import SamplingParams, with_options
from tp_mamba.quoting import quoted

PROMPTS = ("prompt", "prompt_token_ids")
OPTIONS = tuple(field.name for field in fields(SamplingParams))
RESULTS = (
    "made_from",
    "text",
    "token_ids",
    "finish_reason",
    "error",
    "samples",
)
"""Fields of a result besides those that are carried through."""

MOST_BYTES = 64 * 2**20
"""Bytes of one line; a longer one fails, and is never held in memory."""


class BadRequestError(ValueError):
    """A line that asks for nothing that can be done; ``carried`` is what its result still carries."""

    def __init__(self, sentence: str, carried: dict[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.carried = carried or {}


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank."""

    number: int
    """In the file, from 1, blank lines counted."""
    position: int
    """Among the lines that are not blank, from 0: that of its result."""
    content: bytes
    """Without the line's end; cut behind :data:`MOST_BYTES`."""
    digest: str
    """Of the whole line."""
    end: int
    """Bytes of the file up to its end."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a line asks for."""

    prompt: str | list[Any]
    """Text, or token ids, which nobody has looked at yet."""
    params: SamplingParams
    carried: dict[str, Any]
    """Fields that mean nothing here and come back with the result."""


def read_lines(file: Path) -> Generator[Line]:
    """The lines of ``file`` that are not blank, one at a time.

    Raises:
        OSError: it cannot be read.
    """
    number = position = end = 0
    with file.open("rb") as stream:
        while content := stream.readline(MOST_BYTES + 2):
            digest, piece = hashlib.sha256(content.strip()), content
            end += len(piece)
            while not piece.endswith(b"\n") and (piece := stream.readline(2**20)):
                digest.update(piece.rstrip())
                end += len(piece)
            number += 1
            if content := content.strip():
                yield Line(number, position, content, digest.hexdigest()[:16], end)
                position += 1


def parse(line: Line, defaults: SamplingParams) -> Asked:
    """What ``line`` asks for, with the fields that it leaves out as in ``defaults``.

    Raises:
        BadRequestError: it is no JSON object, has no prompt or two, or a parameter is refused.
    """
    if len(line.content) > MOST_BYTES:
        raise BadRequestError(f"the line is longer than {MOST_BYTES // 2**20} MiB: give a shorter prompt")
    request = _object(line.content)
    carried = {name: value for name, value in request.items() if name not in (*PROMPTS, *OPTIONS)}
    if taken := [name for name in carried if name in RESULTS]:
        rest = {name: value for name, value in carried.items() if name not in RESULTS}
        raise BadRequestError(
            f"the field {quoted(taken[0])} is one of the result: give it another name", rest
        )
    given = [name for name in PROMPTS if name in request]
    if len(given) != 1:
        found = "has both prompt and prompt_token_ids" if given else f"has no prompt{_instead(carried)}"
        raise BadRequestError(f'the line {found}: give one of "prompt" and "prompt_token_ids"', carried)
    prompt = request[given[0]]
    try:
        _check_prompt(given[0], prompt)
        params = with_options(defaults, {name: request[name] for name in OPTIONS if name in request})
    except ValueError as error:
        raise BadRequestError(str(error), carried) from None
    return Asked(prompt, params, carried)


def _object(content: bytes) -> dict[str, Any]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequestError(
            f"the line is not UTF-8 at byte {error.start} (0x{content[error.start]:02x}): convert the file to UTF-8"
        ) from None
    try:
        request = json.loads(text, parse_constant=_no_number, object_pairs_hook=_no_repeats)
        json.dumps(request, allow_nan=False)  # 1e999 is read as infinity, which no result could carry
    except json.JSONDecodeError as error:
        raise BadRequestError(
            f"the line is not JSON ({error.msg} at character {error.colno}): give one JSON object per line"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRequestError(f"the line is not JSON ({reason}): give one JSON object per line") from None
    if not isinstance(request, dict):
        raise BadRequestError(
            f'the line is {quoted(text)}, which is no JSON object: give one, as in {{"prompt": "The sea"}}'
        )
    return request


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the field {quoted(twice)} twice")
    return found


def _check_prompt(name: str, prompt: Any) -> None:
    if name == "prompt_token_ids":
        if not isinstance(prompt, list):
            raise ValueError(f"prompt_token_ids is {quoted(prompt)}: give a list of token ids, as in [1, 2]")
    elif not isinstance(prompt, str):
        raise ValueError(f"prompt is {quoted(prompt)}: give text, or token ids as prompt_token_ids")
    elif not prompt:
        raise ValueError("the prompt is empty: give it at least one character")
    else:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt holds {prompt[error.start]!a} at character {error.start}, half of a pair: give both halves"
            ) from None


def _instead(carried: dict[str, Any]) -> str:
    close = [name for name in carried if difflib.get_close_matches(name.lower(), PROMPTS, 1, 0.7)]
    return f", only {quoted(close[0])}" if close else ""


def lookalikes(carried: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names in ``carried`` that look like a misspelt option, each with that option."""
    for name in carried:
        if close := difflib.get_close_matches(name.lower(), OPTIONS, 1, 0.75):
            yield name, close[0]
