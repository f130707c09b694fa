"""Keywords of other libraries that these kernels have no use for.

Hints about how to launch or check change no result and pass with any value. The others would change it: they pass at
their default, and are refused by name otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

ANY_VALUE = object()
"""In place of a default: a hint, which decides no result."""

HINT = (ANY_VALUE, "")

Unused = dict[str, tuple[object, str]]
"""For each keyword its default and what to do instead of passing another value; :data:`HINT` for a hint."""


def only_defaults(op: str, given: Mapping[str, object], unused: Unused) -> None:
    """Check what a call passed beside its signature.

    Args:
        op: name of the function, first word of the error.
        given: the call's further keywords.
        unused: the keywords that may be there.

    Raises:
        TypeError: a keyword that is not in ``unused``.
        ValueError: one that is, with another value than its default.
    """
    for name, value in given.items():
        if name not in unused:
            raise TypeError(f"{op}() got an unexpected keyword argument {name!r}")
        default, remedy = unused[name]
        if default is ANY_VALUE:
            continue
        if value is not default and (isinstance(value, torch.Tensor) or value != default):
            raise ValueError(f"{op}: {name} is not supported; {remedy}")
