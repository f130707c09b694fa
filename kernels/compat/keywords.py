"""Keywords of other libraries that these kernels have no use for: taken at their default, else refused by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Unused = dict[str, tuple[object, str]]
"""For each keyword its default and what to do instead of passing another value."""


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
        if value is not default and (isinstance(value, torch.Tensor) or value != default):
            raise ValueError(f"{op}: {name} is not supported; {remedy}")
