"""Which error of several ranks a person is told, in one sentence, when all of them end because of one."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tp_mamba.launch.console import end_line, harmless, tell
from tp_mamba.launch.ranks.signals import on_sigterm

GRACE_S = 2.0
"""How long whoever knows only of a consequence waits for the cause. torchrun looks at its ranks every tenth of a
second and reports the first that it finds ended: it must find the one that broke."""


class UsageError(ValueError):
    """Arguments that do not go together; exit status 2, as for those that argparse refuses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """Why one rank ended."""

    rank: int
    error: str
    """Name of the exception's type; empty if the process ended without one."""
    sentence: str
    trace: str = ""
    timestamp: float = 0.0
    """Seconds since the epoch when the error was caught; 0 for an exit, which comes first."""
    consequence: bool = False
    """The rank only lost contact with one that had failed before."""

    @classmethod
    def of(cls, error: BaseException, rank: int) -> RankFailure:
        """``error``, caught just now on ``rank``."""
        return cls(
            rank=rank,
            error=type(error).__name__,
            sentence=sentence_of(error, rank),
            trace="".join(traceback.format_exception(error)),
            timestamp=time.time(),
            consequence=is_consequence(error),
        )

    @classmethod
    def of_exit(cls, rank: int, status: int) -> RankFailure:
        """A process that ended without a word, with the exit status that multiprocessing gives it."""
        if status >= 0:
            return cls(rank=rank, error="", sentence=_exit_sentence(rank, status))
        name = signal.Signals(-status).name
        return cls(
            rank=rank, error="", sentence=f"rank {rank} was killed by {name}; the other ranks have been ended"
        )


class LaunchError(RuntimeError):
    """A rank failed; the message is its error in one sentence."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(failure.sentence)
        self.failure = failure


def under_torchrun() -> bool:
    """True in a process that torchrun, or :mod:`tp_mamba.launch.ranks.start`, started as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def in_process_group() -> bool:
    """Whether this process has joined the other ranks."""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _exit_sentence(rank: int, status: object) -> str:
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
        return _exit_sentence(rank, error.code)
    if _lost_contact(error):
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


def _lost_contact(error: BaseException) -> bool:
    # gloo has no type of its own, and NCCL's serves other faults as well: both are known by their text.
    signs = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_consequence(error: BaseException) -> bool:
    """True for what a rank meets when another one disappears: a broken connection, or word of its failure.

    Types are known by name: whatever fails before torch is imported is told without waiting for that.
    """
    if {"RankFailedError", "DistError"} & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return _lost_contact(error) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class Teller:
    """Tells a command's error once: of torchrun's ranks, one of each host does."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._turn = threading.Lock()
        self._had_its_turn = False

    def ended_with_a_word(self) -> AbstractContextManager[None]:
        """Inside, SIGTERM ends a rank of torchrun's with a sentence, unless one has been told; others as ever."""
        return on_sigterm(self._tell_end) if under_torchrun() else nullcontext()

    def tell(self, error: Exception, *, about: str, debug: bool) -> None:
        """Tell ``error`` if this rank is to, and leave it for torchrun's own report; ``debug`` adds its stack.

        ``about`` is the checkpoint: the errors of libraries do not say what they were about.
        """
        rank = int(os.environ.get("RANK", "0"))
        with self._turn:  # SIGTERM waits for the end of this, and then ends the process silently
            self._had_its_turn = True
            failure = RankFailure.of(error, rank)
            leave_for_torchrun(failure, debug=debug)
            if debug:
                trace = error.failure.trace if isinstance(error, LaunchError) else failure.trace
                print(harmless(trace), file=sys.stderr, end="")
            tells = is_teller(failure)
            if tells:
                where = f"rank {rank}: " if rank and not failure.consequence else ""
                named = isinstance(error, ValueError | OSError | RuntimeError) or about in failure.sentence
                tell(self._verb, "error", f"{where}{failure.sentence}" + ("" if named else f" ({about})"))
        if failure.consequence or not tells:
            time.sleep(GRACE_S)

    def _tell_end(self) -> None:
        # torchrun ends ranks after one of them has ended: whoever had an error to tell has told it by then.
        rank = int(os.environ["RANK"])
        with self._turn:
            end_line()
            claim = _claim()
            if not self._had_its_turn and (rank == 0 if claim is None else _take(claim)):
                tell(self._verb, "error", sigterm_sentence(rank))


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
    deadline = time.monotonic() + GRACE_S
    while waits and not claim.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return _take(claim)


def leave_for_torchrun(failure: RankFailure, *, debug: bool) -> None:
    """Leave ``failure`` where torchrun looks for it, in the format of torch.distributed.elastic's error files.

    Not a consequence, which might be shown as the root cause. torch's own ``@record`` would add the stack of every
    error; here that is for ``debug``.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None or failure.consequence:
        return
    extra = {"timestamp": str(int(failure.timestamp))} | ({"py_callstack": failure.trace} if debug else {})
    scratch = Path(f"{error_file}.part")  # torchrun may end this rank at any moment
    scratch.write_text(json.dumps({"message": {"message": failure.sentence, "extraInfo": extra}}))
    scratch.replace(error_file)


def _claim() -> Path | None:
    """A file that whoever tells makes, in torchrun's folder for this attempt; other launchers have none in common."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return None if error_file is None else Path(error_file).parents[1] / "told"


def _take(claim: Path) -> bool:
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
