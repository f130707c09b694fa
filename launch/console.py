"""What a person sees: results on stdout; progress bars, notes and errors on stderr. All printing goes through here.

Names and values that come from files may hold anything, escape codes that rewrite a terminal included:
:func:`visible` makes them fit to be shown.
"""

from __future__ import annotations

import codecs
import io
import json
import multiprocessing
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from tp_mamba.checkpoint.progress import Progress
from tp_mamba.quoting import human_bytes


class OutputError(OSError):
    """stdout does not take the result."""


_line_open = False
"""Text was printed on stdout, and no end of line after it."""

_escaped = False
"""A character was printed as an escape, because the stream's encoding has no other way."""


def visible(text: object) -> str:
    """``str(text)`` with an escape in place of each character that cannot be seen."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(text))


def harmless(text: str) -> str:
    """Generated text for a terminal: as it is, but for control characters, which are escaped; not newline and tab."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else _escape(c) for c in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def write(text: str) -> None:
    """Print a piece of text on stdout at once.

    Raises:
        OutputError: stdout is closed, or takes no more.
        BrokenPipeError: whoever read it has left.
    """
    global _line_open
    if sys.stdout is None:
        raise OutputError("standard output is closed: there is nowhere to print the result")
    if text:
        _line_open = not text.endswith("\n")
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(
            f"standard output takes no more ({error.strerror}): the result is not whole"
        ) from error


def write_generated(text: str) -> None:
    """:func:`write` for text of a model: harmless on a terminal; as it is into a pipe or file."""
    write(harmless(text) if sys.stdout is not None and sys.stdout.isatty() else text)


def end_line() -> None:
    """End the line of text that is open on stdout, if one is: what follows, on stderr too, gets its own."""
    if _line_open:
        write("\n")


def tell(verb: str, kind: str, sentence: str) -> None:
    """Print one sentence on stderr, of a ``kind`` such as ``error``."""
    print(f"{f'tp-mamba {verb}'.strip()}: {kind}: {visible(sentence)}", file=sys.stderr, flush=True)


_told: set[str] = set()
"""Notes that were printed: a command looks at a folder more than once."""


def _first_on_this_host() -> bool:
    """Whether no rank or launcher before this process tells the same: notes are about files, which all of them see."""
    return multiprocessing.parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def streams_that_take_all(verb: str) -> Iterator[None]:
    """Inside, stdout and stderr take every character, and warnings of this package are notes of ``verb``.

    A closed stderr swallows what is printed; a stream in another encoding than UTF-8 gets escapes, which a note
    tells at the end.
    """
    global _escaped
    _occupy_standard_files()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    _escaped = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tp_mamba_escape")
    shown = warnings.showwarning

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.startswith("tp_mamba."):
            sentence = str(message)
            if sentence not in _told and _first_on_this_host():
                _told.add(sentence)
                tell(verb, "note", sentence)
        else:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show_warning
    try:
        yield
    finally:
        warnings.showwarning = shown
        if _escaped:
            tell(
                verb,
                "note",
                "what the output's encoding cannot say was escaped; PYTHONIOENCODING=utf-8 says all",
            )


def _occupy_standard_files() -> None:
    # A file that is opened where stdin, stdout or stderr is missing would get its number, and what libraries print.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _backslashes(error: UnicodeError) -> tuple[str | bytes, int]:
    global _escaped
    _escaped = True
    return codecs.backslashreplace_errors(error)


codecs.register_error("tp_mamba_escape", _backslashes)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout; what cannot be seen is escaped, as JSON allows."""
    text = json.dumps(value, ensure_ascii=not _takes_unicode(sys.stdout), indent=2)
    write(re.sub(r"[^\n -~]", _json_escape, text) + "\n")


def _json_escape(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1]


def _takes_unicode(stream: TextIO | None) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> Table:
    """A plain table; the first ``left`` columns are text, the others are figures set to the right."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(visible(cell) for cell in row))
    return grid


def facts(pairs: Sequence[tuple[str, object]]) -> Table:
    """A table of two columns: what, and its value."""
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, visible(value))
    return grid


def show(*parts: Table | str, to_stdout: bool = False) -> None:
    """Print tables and lines of text, on stderr unless they are the result itself; piped, they keep their width."""
    stream = sys.stdout if to_stdout else sys.stderr
    terminal = stream is not None and stream.isatty()
    printed = io.StringIO()
    console = Console(
        file=printed,
        force_terminal=terminal,
        width=None if terminal else 160,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for part in parts:
        console.print(visible(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))
    if to_stdout:
        write(printed.getvalue())
    else:
        print(printed.getvalue(), end="", file=sys.stderr, flush=True)


def show_written(folder: Path, seconds: float, extra: dict[str, Any], *, as_json: bool) -> None:
    """Say what a verb has written into ``folder``: its files of weights and their size."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    size = sum(path.stat().st_size for path in files)
    if as_json:
        names = [path.name for path in files]
        print_json({"folder": str(folder), "files": names, "bytes": size, "seconds": seconds, **extra})
    else:
        plural = "s" if len(files) > 1 else ""
        weights = f"{human_bytes(size)} of weights in {len(files)} file{plural}, {seconds:.1f} s"
        write(f"wrote {visible(folder)}: {weights}\n")


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress | None]:
    """Give a callback that draws a bar on stderr; None if not ``enabled`` or where stderr is no terminal."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def progress(what: str, done_bytes: int, total_bytes: int) -> None:
            task = bars.task_ids[0] if bars.task_ids else bars.add_task(what)
            bars.update(task, description=visible(what), completed=done_bytes, total=total_bytes)

        yield progress
