"""The file of results: one line per request, in the order of the requests, whole at every moment but the last write.

A run may be killed anywhere. What it leaves is some whole lines and perhaps the beginning of one more, which
``--resume`` cuts off. Every result names what it was made from, so that a file is never continued with the results of
other requests or of another model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tp_mamba.launch.console import OutputError
from tp_mamba.launch.jsonl.requests import Line, read_lines
from tp_mamba.quoting import shown_path

REMEDY = "--resume goes on with it, --overwrite begins anew"


@dataclass(frozen=True, slots=True)
class Found:
    """What lies at the place of the results before a run."""

    lines: int = 0
    """Whole results."""
    size: int = 0
    """Their bytes."""
    tail: int = 0
    """Bytes behind them: the beginning of one more, where a run was killed."""
    failed: int = 0
    """Results that are errors."""
    first_failure: tuple[int, str] | None = None
    """The line of the first of them, and its error."""
    settings: str | None = None
    """Digest of the settings of the run that made them; None if there are none."""
    read: int = 0
    """Bytes of the requests up to the last that has a result."""


def examine(requests: Path, output: Path, *, resume: bool, overwrite: bool) -> Found:
    """Refuse files that cannot work, before anything is written or computed; with ``resume``, read what is there.

    Raises:
        ValueError: ``requests`` cannot be read; ``output`` cannot be written, exists without a word about it, is
            being written by another process, or holds results of other requests.
    """
    _check_readable(requests)
    if not output.exists():
        folder = output.absolute().parent
        if not folder.is_dir():
            raise ValueError(
                f"--output {shown_path(output)}: there is no folder {shown_path(folder)}, make it first"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"--output {shown_path(output)}: the folder cannot be written, name a place in another"
            )
        return Found()
    if not stat.S_ISREG(output.stat().st_mode):
        raise ValueError(
            f"--output {shown_path(output)} is no file: results need one, which --resume can read again"
        )
    if output.samefile(requests):
        raise ValueError(f"--output {shown_path(output)} is the file of --prompts: name another")
    if not (resume or overwrite):
        raise ValueError(f"--output {shown_path(output)} exists: {REMEDY}")
    try:
        with output.open("r+b") as file:
            _lock(file.fileno(), output)
    except PermissionError as error:
        raise ValueError(f"--output {shown_path(output)} cannot be written ({error.strerror})") from None
    return _examine_results(requests, output) if resume else Found()


def _check_readable(requests: Path) -> None:
    try:
        if not stat.S_ISREG(requests.stat().st_mode):
            raise ValueError(
                f"--prompts {shown_path(requests)} is no file: give one with one JSON object per line"
            )
        requests.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"--prompts {shown_path(requests)} cannot be read ({error.strerror}): give a file of JSON lines"
        ) from None


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--output {shown_path(output)} is being written by another process: wait for its end, or name another file"
        ) from None
    except OSError:
        return  # a file system without locks


def _examine_results(requests: Path, output: Path) -> Found:
    """The results that are there, each held against the request at its place."""
    lines = size = failed = read = 0
    first_failure: tuple[int, str] | None = None
    settings: str | None = None
    asked = read_lines(requests)
    with output.open("rb") as file:
        for content in file:
            if not content.endswith(b"\n"):
                break  # half a line
            lines, size = lines + 1, size + len(content)
            where = f"line {lines} of --output {shown_path(output)}"
            result = _result(content, where)
            line = next(asked, None)
            if line is None:
                raise ValueError(
                    f"{where} has no request: --prompts {shown_path(requests)} holds only {lines - 1}, give the file "
                    "that the results were made from, or --overwrite to begin anew"
                )
            digest, _, its_settings = result["made_from"].partition("-")
            if digest != line.digest:
                raise ValueError(
                    f"{where} was made from another request than line {line.number} of --prompts "
                    f"{shown_path(requests)}: give the file that the results were made from, or --overwrite to begin "
                    "anew"
                )
            if its_settings != (settings := settings or its_settings):
                raise ValueError(f"{where} was made with other settings than line 1: --overwrite begins anew")
            read = line.end
            if result["error"] is not None:
                failed += 1
                first_failure = first_failure or (line.number, str(result["error"]))
    return Found(lines, size, output.stat().st_size - size, failed, first_failure, settings, read)


def _result(content: bytes, where: str) -> dict[str, Any]:
    try:
        result = json.loads(content)
        if isinstance(result, dict) and isinstance(result["made_from"], str) and "error" in result:
            return result
    except (ValueError, KeyError, RecursionError):
        pass
    raise ValueError(
        f"{where} is no result of tp-mamba generate: name another file, or --overwrite to begin anew"
    )


def encode(
    line: Line,
    settings: str,
    carried: dict[str, Any],
    *,
    text: str | None,
    token_ids: Sequence[int],
    finish_reason: str,
    error: str | None,
    more: Mapping[str, Any] | None = None,
) -> bytes:
    """One result as a line of the file; ``more`` is what the request has asked for besides."""
    result = carried | {
        "text": text,
        "token_ids": token_ids,
        **(more or {}),
        "finish_reason": finish_reason,
        "error": error,
        "made_from": f"{line.digest}-{settings}",
    }
    try:
        return json.dumps(result, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a pair of surrogates, as JSON can say it in escapes alone
        return json.dumps(result).encode() + b"\n"


class ResultsFile:
    """Takes results in any order and writes each as soon as all before it are written.

    Attributes:
        written: results that are in the file, those of earlier runs included.
    """

    def __init__(self, path: Path, found: Found, *, fresh: bool) -> None:
        """Open ``path`` behind the results that were ``found`` there, and cut off what is behind them.

        Args:
            fresh: nothing may be there.

        Raises:
            ValueError: another process has written there since, or does.
            OutputError: the file cannot be opened.
        """
        self._path, self._waiting = path, dict[int, bytes]()
        self.written, self._size = found.lines, found.size
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | (os.O_EXCL if fresh else 0)
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except FileExistsError:
            raise ValueError(
                f"--output {shown_path(path)} was made by another process just now: {REMEDY}"
            ) from None
        except OSError as error:
            raise OutputError(f"--output {shown_path(path)} cannot be written ({error.strerror})") from error
        _lock(self._descriptor, path)
        if found.lines and os.fstat(self._descriptor).st_size != found.size + found.tail:
            raise ValueError(
                f"--output {shown_path(path)} has grown since this command began: another one writes it"
            )
        os.ftruncate(self._descriptor, self._size)

    @property
    def waiting(self) -> int:
        """Results that wait for one before them."""
        return len(self._waiting)

    def put(self, position: int, result: bytes) -> None:
        """Take the result at ``position``.

        Raises:
            OutputError: the file takes no more; what is in it is whole.
        """
        self._waiting[position] = result
        while (content := self._waiting.pop(self.written, None)) is not None:
            self._write(content)
            self.written += 1

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # --resume cuts the half line off as well
                os.ftruncate(self._descriptor, self._size)
            raise self._full(error) from error
        self._size += len(content)

    def close(self) -> None:
        """See to it that what was written outlives a loss of power; a second call does nothing.

        Raises:
            OutputError: the file system has not kept it.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise self._full(error) from error
        finally:
            os.close(descriptor)

    def _full(self, error: OSError) -> OutputError:
        return OutputError(
            f"--output {shown_path(self._path)} takes no more ({error.strerror}): results in it so far: "
            f"{self.written}, make room and go on with --resume"
        )
