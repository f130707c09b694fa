"""Units, and a progress bar that a pipe never sees."""

from __future__ import annotations

import io
import sys

import pytest

from tp_mamba.launch.console import human_bytes, progress_bar


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536 * 1024, "1.50 MiB"), (5 * 2**40, "5.00 TiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar() as progress:
        assert progress is not None
        progress("loading weights", 1, 4)
        progress("loading weights", 4, 4)
    assert "loading weights" in stderr.getvalue()


@pytest.mark.parametrize(("stream", "enabled"), [(io.StringIO(), True), (Terminal(), False)])
def test_no_bar_elsewhere(stream: io.StringIO, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(enabled) as progress:
        assert progress is None
    assert stream.getvalue() == ""
