"""How far a file of requests is, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tp_mamba.launch.console import visible
from tp_mamba.launch.jsonl.run import Counts


@contextmanager
def requests_bar(requests: Path) -> Iterator[Callable[[Counts], None]]:
    """Give a function that draws a bar on stderr, by bytes of ``requests``; one that does nothing where that is no
    terminal."""
    if not sys.stderr.isatty():
        yield lambda counts: None
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task, began = bars.add_task(visible(requests.name), total=requests.stat().st_size), time.monotonic()

        def draw(counts: Counts) -> None:
            rate = counts.new_tokens / max(time.monotonic() - began, 1e-9)
            failed = f", {counts.failed:,} failed" if counts.failed else ""
            text = f"{visible(requests.name)}: {counts.lines:,} done{failed}, {rate:,.0f} tokens/s"
            bars.update(task, description=text, completed=counts.read)

        yield draw
