"""Documents of text files and JSON lines, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tp_mamba.quoting import quoted, shown, shown_path

JSON_LINES: Final = (".jsonl", ".ndjson")
"""Suffixes of files that hold one JSON object per line, each a document; any other file is one document."""


def read_documents(path: Path, field: str = "text") -> Iterator[str]:
    """The documents of one file, empty ones left out.

    Args:
        path: a file of UTF-8 text, which is one document, or of JSON lines, where each line holds one.
        field: the key of a line's object that holds its text.

    Raises:
        ValueError: the file is not UTF-8, or a line of it is no JSON object with a string under ``field``.
        OSError: it cannot be read.
    """
    with path.open(encoding="utf-8", newline="") as file:
        try:
            if path.suffix not in JSON_LINES:
                if text := file.read():
                    yield text
                return
            for number, line in enumerate(file, 1):
                if line.strip() and (text := _text_of(line, f"{shown_path(path)}, line {number}", field)):
                    yield text
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{shown_path(path)} is not UTF-8 text ({shown(error.reason)} at byte {error.start} of what was read): "
                "convert it first"
            ) from error


def check_files(paths: Sequence[Path]) -> None:
    """Refuse data files that are not there or hold nothing, before anything is read.

    Raises:
        ValueError: no files, or one that is missing, a folder, or empty.
    """
    if not paths:
        raise ValueError("no data file was given: name a text file, or one of JSON lines (.jsonl)")
    for path in paths:
        if not path.exists():
            raise ValueError(f"the data file {shown_path(path)} does not exist: check its path")
        if not path.is_file():
            raise ValueError(f"{shown_path(path)} is not a file: name the data files one by one")
        if not path.stat().st_size:
            raise ValueError(f"the data file {shown_path(path)} is empty: there is nothing to learn from it")


def _text_of(line: str, where: str, field: str) -> str:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({shown(error)}): each line must be one JSON object") from error
    text = content.get(field) if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{where} has no string under {quoted(field)}: each line must be an object with its text there (another "
            "key is named by --text-field)"
        )
    return text
