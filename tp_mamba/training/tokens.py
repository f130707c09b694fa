"""Token ids of data files, computed once and kept in a memory-mapped cache.

A cache entry is a folder with ``tokens.bin`` (uint16, or uint32 where the vocabulary needs it) and ``ends.npy`` (int64:
where each document ends). Its name is a digest of all that decides its content: the files with their sizes and
times, the tokenizer, the end-of-text id and the JSON field.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer

from tp_mamba.checkpoint.atomic import put_in_place
from tp_mamba.checkpoint.leftovers import recover, workplace
from tp_mamba.quoting import shown, shown_path
from tp_mamba.training.documents import check_files, read_documents

BYTE_VOCABULARY: Final = 256
"""Ids of the tokenizer that there is without a file: a byte is its own id."""

_FORMAT: Final = 1
_BATCH: Final = 1 << 20
"""Characters that are tokenized at a time."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Documents as one run of token ids."""

    ids: np.ndarray
    """``[tokens]`` unsigned integers, memory-mapped."""

    bounds: np.ndarray
    """``[documents + 1]`` int64: document ``i`` is ``ids[bounds[i]:bounds[i + 1]]``."""

    def __len__(self) -> int:
        return int(self.bounds[-1] - self.bounds[0])

    def split(self, fraction: float) -> tuple[Tokens, Tokens]:
        """All but the last ``fraction`` of the tokens, and these; a document that the cut falls into is cut."""
        cut = int(self.bounds[0]) + round(len(self) * (1 - fraction))
        inner = self.bounds[1:-1]
        first, last = self.bounds[:1], self.bounds[-1:]
        at = np.array([cut], dtype=np.int64)
        return (
            Tokens(self.ids, np.concatenate([first, inner[inner < cut], at])),
            Tokens(self.ids, np.concatenate([at, inner[inner > cut], last])),
        )


def read_tokens(
    paths: Sequence[Path],
    tokenizer: Tokenizer | None,
    *,
    cache: Path,
    end_of_text: int | None = None,
    field: str = "text",
) -> Tokens:
    """The token ids of ``paths``, from ``cache`` if they were computed before.

    Processes that ask for the same at once, the ranks of a host, compute it once: the others wait.

    Args:
        paths: text files and files of JSON lines, see :func:`tp_mamba.training.documents.read_documents`.
        tokenizer: None takes the UTF-8 bytes for the ids.
        cache: the folder that holds the entries; made if it is not there.
        end_of_text: the id that is put after each document, if any.
        field: the key of the text in JSON lines.

    Raises:
        ValueError: a file is missing, empty, or not what its name says, or all of them hold no token.
        OSError: the cache cannot be written.
    """
    check_files(paths)
    entry = cache / _digest(paths, tokenizer, end_of_text, field)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_suffix(".lock")):
            if not entry.is_dir():
                _write(entry, paths, tokenizer, end_of_text, field)
    except OSError as error:
        raise OSError(
            f"cannot keep the tokens of the data in {shown_path(cache)} ({shown(error.strerror or error)}): make room "
            "there, or name another folder with --cache"
        ) from error
    bounds = np.load(entry / "ends.npy")
    dtype = _dtype(tokenizer)
    if not len(bounds) or not bounds[-1]:
        named = ", ".join(shown(path.name) for path in paths)
        raise ValueError(f"the data ({named}) holds no text: there is nothing to learn from it")
    ids = np.memmap(entry / "tokens.bin", dtype=dtype, mode="r")
    return Tokens(ids, np.concatenate([np.zeros(1, np.int64), bounds]))


def _digest(paths: Sequence[Path], tokenizer: Tokenizer | None, end_of_text: int | None, field: str) -> str:
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    how = "bytes" if tokenizer is None else tokenizer.to_str()
    content = json.dumps([_FORMAT, files, how, end_of_text, field])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _dtype(tokenizer: Tokenizer | None) -> type[np.unsignedinteger]:
    largest = BYTE_VOCABULARY - 1
    if tokenizer is not None:
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    return np.uint16 if largest < 1 << 16 else np.uint32


def _write(
    entry: Path, paths: Sequence[Path], tokenizer: Tokenizer | None, end_of_text: int | None, field: str
) -> None:
    recover(entry)
    with workplace(entry) as (new, old):
        new.mkdir()
        ends, count = [], 0
        with (new / "tokens.bin").open("wb") as file:
            for ids in _encoded((text for path in paths for text in read_documents(path, field)), tokenizer):
                document = ids if end_of_text is None else np.append(ids, np.asarray(end_of_text, ids.dtype))
                file.write(document.tobytes())
                count += len(document)
                ends.append(count)
        np.save(new / "ends.npy", np.asarray(ends, dtype=np.int64))
        put_in_place(new, entry, old)


def _encoded(documents: Iterator[str], tokenizer: Tokenizer | None) -> Iterator[np.ndarray]:
    """The ids of each document; short documents go to the tokenizer together, which has a thread for each core."""
    if tokenizer is None:
        for text in documents:
            yield np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)
        return
    dtype, waiting, size = _dtype(tokenizer), [], 0
    for text in documents:
        waiting.append(text)
        size += len(text)
        if size >= _BATCH:
            yield from _batch(tokenizer, waiting, dtype)
            waiting, size = [], 0
    yield from _batch(tokenizer, waiting, dtype)


def _batch(tokenizer: Tokenizer, texts: list[str], dtype: type[np.unsignedinteger]) -> Iterator[np.ndarray]:
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        yield np.asarray(encoding.ids, dtype=dtype)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
