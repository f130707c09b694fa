"""From a file of requests to a file of results: rank 0 reads and writes, the other ranks follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tp_mamba.engine.collected import Collected
from tp_mamba.engine.intake import checked_prompt
from tp_mamba.engine.leader import Leader
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import TokenEvent
from tp_mamba.engine.token_logprob import TokenLogprob
from tp_mamba.launch.jsonl.requests import BadRequestError, Line, lookalikes, parse, read_lines
from tp_mamba.launch.jsonl.results import Found, ResultsFile, encode
from tp_mamba.quoting import quoted, shown

AHEAD = 2
"""Requests that the engine holds, as a multiple of those that run at a time: the next ones are there when a slot is
free."""

WINDOW = 32
"""Results that may wait for one before them, as a multiple of the requests that run at a time."""

LEAST_LOGPROB = -9999.0
"""Stands for what is less, such as minus infinity, which JSON has no number for; vLLM's value."""


@dataclass(slots=True)
class _Running:
    """A request in the engine, and what it has made."""

    line: Line
    carried: dict[str, Any]
    samples: list[Collected] = field(default_factory=list)
    """One, or as many as ``n`` asks for."""

    @property
    def has_ended(self) -> bool:
        """Whether every sample has."""
        return all(made.finish_reason is not None for made in self.samples)


@dataclass(slots=True)
class Counts:
    """How far the work is."""

    lines: int
    """Results in the file or waiting for one before them, those of earlier runs included."""
    failed: int
    first_failure: tuple[int, str] | None
    """The first line that failed, and its error."""
    read: int
    """Bytes of the requests that were read."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    """Of this run."""


class FileRun:
    """Continues the requests of a file that have no result yet.

    Only as many are in memory as the engine holds, and as many results as wait for one before them: both are bounded
    by the batch, not by the file.

    Attributes:
        settings: a digest of what the results depend on besides their lines.
    """

    def __init__(
        self,
        leader: Leader,
        encode_prompt: Callable[[str], list[int]],
        defaults: SamplingParams,
        settings: str,
        *,
        vocab_size: int,
        note: Callable[[str], None],
        text_only: bool = False,
    ) -> None:
        """Serve through ``leader``.

        Args:
            encode_prompt: the token ids of a text; ValueError where that cannot be.
            defaults: parameters that a line leaves out.
            settings: what the results depend on besides their lines, as a digest.
            vocab_size: ids are below it.
            note: told what a person should know about the requests.
            text_only: refuse prompts of token ids, which no chat template takes.
        """
        self.settings = settings
        self._leader, self._encode_prompt, self._defaults = leader, encode_prompt, defaults
        self._vocab_size, self._note, self._text_only = vocab_size, note, text_only
        self._running: dict[int, tuple[_Running, Collected]] = {}
        self._noted: set[str] = set()

    def __call__(
        self, requests: Path, results: ResultsFile, found: Found, progress: Callable[[Counts], None]
    ) -> Counts:
        """Continue ``requests`` behind those that have a result, and tell ``progress`` after every step.

        Raises:
            OSError: a file cannot be read, or takes no more.
        """
        self._results = results
        self._counts = Counts(found.lines, found.failed, found.first_failure, found.read)
        batch, leader = self._leader.max_batch_size, self._leader
        with closing(read_lines(requests)) as every:
            lines: Iterator[Line] = islice(every, found.lines, None)
            while True:
                while len(self._running) < AHEAD * batch and results.waiting < WINDOW * batch:
                    if (line := next(lines, None)) is None:
                        break
                    self._admit(line)
                if not leader.has_work:
                    return self._counts
                for event in leader.step():
                    self._take(event)
                progress(self._counts)

    def _admit(self, line: Line) -> None:
        self._counts.read = line.end
        try:
            asked = parse(line, self._defaults)
        except BadRequestError as error:
            self._refuse(_Running(line, error.carried), error)
            return
        for name, option in lookalikes(asked.carried):
            if name not in self._noted:
                self._noted.add(name)
                self._note(
                    f"line {line.number}: {quoted(name)} is no option and is carried through: {option} is one"
                )
        running = _Running(line, asked.carried)
        try:
            ids = checked_prompt(line.number, self._ids(asked.prompt), self._vocab_size)
            index = self._leader.add_request(ids, asked.params, position=line.position)
        except ValueError as error:
            self._refuse(running, error)
            return
        self._counts.prompt_tokens += len(ids)
        for sample in range(asked.params.n):
            running.samples.append(Collected())
            self._running[index + sample] = running, running.samples[-1]

    def _ids(self, prompt: str | list[Any]) -> list[Any]:
        if isinstance(prompt, str):
            return self._encode_prompt(prompt)
        if self._text_only:
            raise ValueError(
                "prompt_token_ids was given with --chat, whose template takes text: give a prompt"
            )
        return prompt

    def _take(self, event: TokenEvent) -> None:
        running, made = self._running[event.index]
        self._counts.new_tokens += event.token_id is not None
        made.take(event)
        if event.finish_reason is not None:
            del self._running[event.index]
            if running.has_ended:
                self._finish(running)

    def _refuse(self, running: _Running, error: ValueError) -> None:
        running.samples = [Collected(finish_reason="error", error=shown(error, 1000))]
        self._finish(running)

    def _finish(self, running: _Running) -> None:
        line, first = running.line, running.samples[0]
        error = next((made.error for made in running.samples if made.error is not None), None)
        more = _logprobs(first)
        if len(running.samples) > 1:
            more["samples"] = [_sample(made) for made in running.samples]
        result = encode(
            line,
            self.settings,
            running.carried,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason or "error",
            error=error,
            more=more,
        )
        self._counts.lines += 1
        if error is not None:
            self._counts.failed += 1
            failure = (line.number, error)
            self._counts.first_failure = min(self._counts.first_failure or failure, failure)
        self._results.put(line.position, result)


def _sample(made: Collected) -> dict[str, Any]:
    """One of several samples; the first is also what the result says itself."""
    return {
        "text": made.text,
        "token_ids": made.token_ids,
        **_logprobs(made),
        "finish_reason": made.finish_reason,
        "error": made.error,
    }


def _logprobs(made: Collected) -> dict[str, Any]:
    """What a result says of logprobs, those of them that were asked for."""
    found = {"logprobs": made.logprobs, "prompt_logprobs": made.prompt_logprobs}
    return {name: [_plain(each) for each in value] for name, value in found.items() if value is not None}


def _plain(logprob: TokenLogprob | None) -> dict[str, Any] | None:
    if logprob is None:
        return None
    top = [{"token_id": token, "logprob": max(value, LEAST_LOGPROB)} for token, value in logprob.top]
    return {"token_id": logprob.token_id, "logprob": max(logprob.logprob, LEAST_LOGPROB), "top": top}
