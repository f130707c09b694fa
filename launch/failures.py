"""Which rank's error to tell a person about, when several ranks end because of one."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD_NAME = "failure.json"

CONSEQUENCE_GRACE_S = 2.0
"""How long a rank that only lost contact waits before it exits. The launcher looks at its ranks every tenth
of a second and reports the first that it finds ended: it must find the one that broke."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """Why one rank ended."""

    rank: int
    error: str
    """Name of the exception's type."""
    sentence: str
    trace: str
    timestamp: float
    """Seconds since the epoch, when the error was caught."""
    consequence: bool
    """The rank only lost contact with one that had failed before."""


class UsageError(ValueError):
    """Arguments that do not go together; exit status 2, as for those that argparse refuses."""


class LaunchError(RuntimeError):
    """A rank failed; the message is its error in one sentence."""

    def __init__(self, sentence: str, trace: str = "", error: str = "") -> None:
        super().__init__(sentence)
        self.trace = trace
        self.error = error


class StoppedError(RuntimeError):
    """A signal told the launcher to stop; ``signum`` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def exit_sentence(rank: int, status: object) -> str:
    """What to say of a rank that simply exited."""
    return f"rank {rank} exited with status {status} before its work was done"


def sigterm_sentence(rank: int) -> str:
    """What a rank says that was sent SIGTERM: only the launcher knows whether a rank or a person was the cause."""
    return (
        f"rank {rank} was ended by SIGTERM before its work was done: another rank ended, or the launcher was stopped; "
        "see the launcher's report"
    )


def sentence_of(error: BaseException, rank: int) -> str:
    """``error`` on one line; types that a person cannot place from the text alone are named.

    RuntimeError itself, unlike its subclasses, says nothing that its text does not.
    """
    if isinstance(error, SystemExit):
        return exit_sentence(rank, error.code)
    if lost_contact(error):
        return (
            f"rank {rank} lost contact with another rank, which ended before its work was done; "
            "see that rank's error"
        )
    text = " ".join(str(error).split())
    plain = (
        isinstance(error, ValueError | OSError | LaunchError)
        or type(error) is RuntimeError
        or type(error).__name__ == "RankFailedError"
    )
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")


def lost_contact(error: BaseException) -> bool:
    """True for a connection that broke because the process at its other end is gone.

    gloo has no type of its own, and NCCL's serves other faults as well: both are known by their text.
    """
    text = str(error)
    broken = "Connection closed by peer" in text or "Connection reset by peer" in text
    return isinstance(error, RuntimeError) and (broken or "ncclRemoteError" in text)


def is_consequence(error: BaseException) -> bool:
    """True for what a rank meets when another one disappears: a broken connection, or word of its failure.

    torch has types for NCCL's and the store's errors; gloo's arrive as a RuntimeError known by its text. Types
    are known by name: whatever fails before torch is imported is told without waiting for that.
    """
    if {"RankFailedError", "DistError"} & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return lost_contact(error) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def record_failure(error: BaseException, rank: int, *, debug: bool = False) -> RankFailure:
    """Describe ``error`` and, for a rank with an error file of the launcher's, write it beside that file.

    ``debug`` puts the stack trace into the file that torchrun shows in its own report.
    """
    failure = RankFailure(
        rank=rank,
        error=type(error).__name__,
        sentence=sentence_of(error, rank),
        trace="".join(traceback.format_exception(error)),
        timestamp=time.time(),
        consequence=is_consequence(error),
    )
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        _write_atomically(Path(error_file).with_name(RECORD_NAME), json.dumps(asdict(failure)))
        # torchrun shows this one in its report, in the format that torch.distributed.elastic reads; one of a
        # consequence might come out as the root cause there.
        if not failure.consequence:
            extra = {"timestamp": str(int(failure.timestamp))}
            if debug:
                extra["py_callstack"] = failure.trace
            message = {"message": failure.sentence, "extraInfo": extra}
            _write_atomically(Path(error_file), json.dumps({"message": message}))
    return failure


def _write_atomically(path: Path, text: str) -> None:
    # The launcher may end this rank at any moment: a half-written record must never be read.
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(text)
    scratch.replace(path)


def first_failure(folder: Path) -> RankFailure | None:
    """The earliest record under ``folder``, causes before consequences; None if no rank left one."""
    records = [RankFailure(**json.loads(path.read_text())) for path in folder.rglob(RECORD_NAME)]
    return min(records, key=lambda failure: (failure.consequence, failure.timestamp), default=None)
