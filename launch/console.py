"""What a person sees: progress bars and tables on stderr, so that stdout carries only the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tp_mamba.checkpoint.progress import Progress


def human_bytes(count: int) -> str:
    """``count`` bytes in binary units: ``1.50 MiB``."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> Table:
    """A plain table; the first ``left`` columns are text, the others are figures set to the right."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    return grid


def facts(pairs: Sequence[tuple[str, object]]) -> Table:
    """A table of two columns: what, and its value."""
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, str(value))
    return grid


def show(*parts: Table | str, to_stdout: bool = False) -> None:
    """Print tables and lines of text, on stderr unless they are the result itself; piped, they keep their width."""
    stream = sys.stdout if to_stdout else sys.stderr
    console = Console(file=stream, width=None if stream.isatty() else 160, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def show_written(folder: Path, seconds: float, extra: dict[str, Any], *, as_json: bool) -> None:
    """Say what a verb has written into ``folder``: its files of weights and their size."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    size = sum(path.stat().st_size for path in files)
    if as_json:
        names = [path.name for path in files]
        print_json({"folder": str(folder), "files": names, "bytes": size, "seconds": seconds, **extra})
    else:
        plural = "s" if len(files) > 1 else ""
        print(f"wrote {folder}: {human_bytes(size)} of weights in {len(files)} file{plural}, {seconds:.1f} s")


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress | None]:
    """Give a callback that draws a bar on stderr; None if not ``enabled`` or where stderr is no terminal."""
    if not enabled or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:

        def progress(what: str, done_bytes: int, total_bytes: int) -> None:
            task = bars.task_ids[0] if bars.task_ids else bars.add_task(what)
            bars.update(task, description=what, completed=done_bytes, total=total_bytes)

        yield progress
