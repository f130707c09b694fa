"""Which rank tells an error, when torchrun's ranks end because of one and each of them could."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tp_mamba.launch.environment import in_process_group, under_torchrun
from tp_mamba.launch.failures import CONSEQUENCE_GRACE_S, RankFailure

CLAIM_NAME = "told"


def is_teller(failure: RankFailure) -> bool:
    """Whether this rank is the one of its host that tells its ``failure``; True for a process on its own.

    The first to ask is. A rank that was told of another's error leaves that one the time to ask first, and
    before the ranks have joined, when all meet the same error, rank 0. A rank that lost contact need not wait:
    whoever has an error to tell tells it before it lets go of the others.
    """
    if not under_torchrun():
        return True
    claim = _claim()
    if claim is None:
        return failure.rank == 0 or (in_process_group() and not failure.consequence)
    waits = failure.error == "RankFailedError" or (failure.rank > 0 and not in_process_group())
    deadline = time.monotonic() + CONSEQUENCE_GRACE_S
    while waits and not claim.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return _take(claim)


def is_teller_at_once(rank: int) -> bool:
    """Whether ``rank``, which torchrun ends, tells that; it waits for nobody.

    torchrun ends ranks after one of them has ended: whoever had an error to tell has told it by then.
    """
    claim = _claim()
    return rank == 0 if claim is None else _take(claim)


def tell(verb: str, sentence: str) -> None:
    """Print the one sentence in which a command fails."""
    print(f"tp-mamba {verb}: error: {sentence}", file=sys.stderr, flush=True)


def _claim() -> Path | None:
    # In the launcher's folder for this attempt, all ranks in it; those of another launcher's have none in common.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return None if error_file is None else Path(error_file).parents[1] / CLAIM_NAME


def _take(claim: Path) -> bool:
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
