"""Names and values that come from files, made fit for an error message.

A file may hold anything: escape codes that rewrite a terminal, a name of a million characters, a lone surrogate
that no encoding takes. Every message of this package passes what it found in a file through one of these two.
"""

from __future__ import annotations

from reprlib import Repr
from typing import Final

NAME_LIMIT: Final = 120
"""Characters of a name or value that a message shows."""
PATH_LIMIT: Final = 400
"""Characters of a path that a message shows."""


class _Short(Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than 4,300 digits in decimal.
        return super().repr_int(x, level) if x.bit_length() <= 1024 else f"<{x.bit_length()} bits>"


_REPR: Final = _Short()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist = 2, 4, 4
_REPR.maxstring = _REPR.maxother = NAME_LIMIT


def shown(text: object, limit: int = NAME_LIMIT) -> str:
    """``str(text)`` on one line: printable characters as they are, others as escapes, a long middle left out.

    For names of tensors and files, and for the messages of libraries. With :data:`PATH_LIMIT` for paths.
    """
    text = str(text)
    if len(text) > limit:
        head = limit * 2 // 3
        text = f"{text[:head]}...{text[len(text) - (limit - head) :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(value: object) -> str:
    """``repr(value)`` on one line and short, whatever it is: for values of config files, strings in quotes."""
    return shown(_REPR.repr(value), 2 * NAME_LIMIT)


def shown_path(path: object) -> str:
    """:func:`shown` for a path, which may be longer than a name."""
    return shown(path, PATH_LIMIT)


def human_bytes(count: int) -> str:
    """``count`` bytes in binary units: ``1.50 MiB``."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"
