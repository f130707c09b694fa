"""Prompts from the command line, from files and from standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tp_mamba.launch.ranks.failures import UsageError

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel


def check_prompt_arguments(texts: Sequence[str], files: Sequence[str]) -> None:
    """Refuse what is wrong whatever the files hold, without reading anything.

    Raises:
        UsageError: there is no prompt, or standard input is to be read twice.
    """
    if not texts and not files:
        raise UsageError(
            "no prompt was given: pass --prompt TEXT, --prompt-file FILE, or --prompt - for standard input"
        )
    if texts.count("-") > 1:
        raise UsageError(
            f"--prompt - was given {texts.count('-')} times: standard input can be read once, use --prompt-file"
        )


def read_prompts(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    """The prompts, in order: ``texts`` (``-`` is standard input), then the content of ``files``, in UTF-8.

    One newline at the end of a file is not part of its prompt.

    Raises:
        ValueError: a prompt is empty or not UTF-8, or a file cannot be read.
    """
    prompts = [_read_stdin() if text == "-" else _checked(text) for text in texts]
    prompts += [_read_file(file) for file in files]
    if empty := [position for position, prompt in enumerate(prompts, 1) if not prompt]:
        raise ValueError(f"prompt {empty[0]} of {len(prompts)} is empty: give it at least one character")
    return prompts


def share_prompts(texts: Sequence[str], files: Sequence[str], tp: TensorParallel) -> list[str]:
    """:func:`read_prompts` of rank 0, on every rank.

    Ranks of one host share one standard input, which a single one may read, and hosts may hold other files
    under the same name.

    Raises:
        ValueError: as :func:`read_prompts`, on rank 0.
        RankFailedError: the same, on the other ranks.
    """
    prompts: list[str] = []
    with tp.agreed():
        if tp.rank == 0:
            prompts = read_prompts(texts, files)
    return tp.broadcast_object(prompts)


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("--prompt - was given but standard input is closed: give the text through a pipe")
    return _decode(sys.stdin.buffer.read(), "--prompt -: standard input")


def _read_file(file: str) -> str:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(
            f"--prompt-file {file} cannot be read ({error.strerror}): give a text file in UTF-8"
        ) from error
    return _decode(content, f"--prompt-file {file}")


def _decode(content: bytes, source: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 at byte {error.start} (0x{content[error.start]:02x}): convert the text to UTF-8"
        ) from error
    return text.replace("\r\n", "\n").removesuffix("\n")


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that the locale does not know are lone surrogates
        return _decode(os.fsencode(text), f"--prompt {text!a}")
    return text
