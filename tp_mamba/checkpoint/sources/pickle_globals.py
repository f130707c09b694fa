"""What a pickle would call, told from its instructions without running any."""

from __future__ import annotations

import mmap
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import torch

_TENSOR_NAMES: Final = {
    "_codecs.encode",
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
}
_MAX_PICKLES: Final = 5
"""torch.save's format of before 2020 is so many pickles in a row: two numbers, sizes, the object, its storages."""


def foreign_call(path: Path) -> str | None:
    """The first function or class that ``path`` names and that no file of plain tensors needs, as ``module.name``.

    ``path`` may be a pickle, several in a row, or a zip file of torch.save. None where there is no such name, or
    where the file is not a pickle or breaks off before it.
    """
    with suppress(Exception), _opened(path) as stream:  # damaged files fail in every imaginable way
        for _ in range(_MAX_PICKLES):
            for name in _globals(stream):
                if not _builds_tensors(name):
                    return name if re.fullmatch(r"[\w.<>]+", name) else "something"  # not our message's text
    return None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | mmap.mmap]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(member) as stream:
                yield stream
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped  # unlike a file, allocates nothing for a length that the content only claims


def _globals(stream: Any) -> Iterator[str]:
    """Each ``module.name`` that one pickle looks up."""
    texts: list[Any] = [None, None]  # STACK_GLOBAL takes the last two that were pushed
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        match opcode.name:
            case "GLOBAL" | "INST":
                yield argument.replace(" ", ".")
            case "STACK_GLOBAL":
                yield f"{texts[-2]}.{texts[-1]}"
            case "BINGET" | "LONG_BINGET" | "GET":
                texts.append(memo.get(int(argument)))
            case "MEMOIZE":
                memo[len(memo)] = texts[-1]
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[int(argument)] = texts[-1]
            case _ if isinstance(argument, str):
                texts.append(argument)


def _builds_tensors(name: str) -> bool:
    """Whether ``name`` is one of those with which torch.save describes tensors."""
    module, _, kind = name.rpartition(".")
    if name in _TENSOR_NAMES or (module == "torch._utils" and kind.startswith("_rebuild_")):
        return True
    if module not in ("torch", "torch.storage"):
        return False
    return kind.endswith("Storage") or isinstance(getattr(torch, kind, None), torch.dtype)
