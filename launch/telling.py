"""Which rank tells an error, when torchrun's ranks end because of one and each of them could."""

from __future__ import annotations

import os
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
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:  # ranks of another launcher's, without a folder in common
        return failure.rank == 0 or (in_process_group() and not failure.consequence)
    claim = (
        Path(error_file).parents[1] / CLAIM_NAME
    )  # the launcher's folder for this attempt, all ranks in it
    waits = failure.error == "RankFailedError" or (failure.rank > 0 and not in_process_group())
    deadline = time.monotonic() + CONSEQUENCE_GRACE_S
    while waits and not claim.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
