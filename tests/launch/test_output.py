"""The printed text: the line ends, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tp_mamba.engine.request import TokenEvent
from tp_mamba.launch.output import Output


def failing(*texts: str, reason: str | None = None) -> Iterator[TokenEvent]:
    for text in texts:
        yield TokenEvent(0, 1, text, reason)
    raise RuntimeError("bad logits")


@pytest.mark.parametrize(
    ("prompts", "texts", "reason", "printed"),
    [
        (["The sea"], (), None, "The sea\n"),
        (["The sea"], (" is", ""), None, "The sea is\n"),
        (["The sea"], (" is\n",), None, "The sea is\n"),
        (["The sea"], (" is",), "length", "The sea is\n"),
        (["The sea", "The land"], (" is",), None, ""),
        (["The sea", "The land"], (" is",), "length", "[1] The sea is\n\n"),
    ],
)
def test_an_error_finds_the_line_ended(
    prompts: list[str],
    texts: tuple[str, ...],
    reason: str | None,
    printed: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RuntimeError, match="bad logits"):
        Output(prompts, True).follow(failing(*texts, reason=reason))
    assert capsys.readouterr().out == printed


def test_a_silent_rank_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="bad logits"):
        Output(["The sea"], False).follow(failing(" is"))
    assert capsys.readouterr().out == ""
