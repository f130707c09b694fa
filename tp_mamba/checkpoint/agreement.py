"""Work that every rank of a group finishes, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tp_mamba.tensor_parallel import TensorParallel


@contextmanager
def agreed(tp: TensorParallel) -> Iterator[None]:
    """Run the body, which must not communicate, and stop every rank if it failed on one.

    Raises:
        BaseException: the body's own, on the ranks where it failed.
        RankFailedError: on the others.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:  # an interrupt too must not leave the other ranks waiting
        error = failure
    tp.agree(error)
