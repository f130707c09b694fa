"""Start the ranks of one host through torchrun's launcher, and end them all when one fails.

A rank that raises writes its error to the folder of torch.distributed.elastic's error files; the launcher
ends the others and :func:`start_ranks` raises that first error. A rank that dies without a word (a signal, an
exit) is named with its exit status.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tp_mamba.launch import interrupts
from tp_mamba.launch.environment import leave_process_group
from tp_mamba.launch.failures import (
    CONSEQUENCE_GRACE_S,
    LaunchError,
    StoppedError,
    exit_sentence,
    first_failure,
    record_failure,
)


def start_ranks(work: Callable[..., Any], *args: Any, size: int, debug: bool = False) -> Any:
    """Run ``work(*args)`` in ``size`` new processes with torchrun's environment; return rank 0's result.

    Args:
        work: a function at the top level of a module; it and ``args`` are pickled.
        size: number of ranks, all on this host.
        debug: let the launcher's own log through.

    Raises:
        LaunchError: a rank raised, was killed or exited; the others have ended too.
        StoppedError: SIGINT, SIGTERM, SIGHUP or SIGQUIT reached this process; all ranks have ended.
    """
    # Children must not find the folders of a checkout (kernels/ is a published package's name) on their path.
    os.environ["PYTHONSAFEPATH"] = "1"
    with tempfile.TemporaryDirectory(prefix="tp-mamba-") as folder, _quiet_launcher(debug):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",  # looking the host's full name up may take seconds without a network
            max_restarts=0,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with interrupts.kept_from_children():
                return elastic_launch(config, _rank_main)(work, *args)[0]
        except ChildFailedError as error:
            raise _explain(error, Path(folder)) from None
        except SignalException as error:
            raise StoppedError(error.sigval) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _rank_main(work: Callable[..., Any], *args: Any) -> Any:
    interrupts.accept()
    rank, failed = int(os.environ["RANK"]), True
    try:
        result = work(*args)
        failed = False
        return result
    except BaseException as error:
        failure = record_failure(error, rank)
        if failure.consequence:
            time.sleep(CONSEQUENCE_GRACE_S)
        # SystemExit passes the launcher's own recorder by, which would write the error a second time.
        sys.exit(1)
    finally:
        leave_process_group(failed=failed)


def _explain(error: ChildFailedError, folder: Path) -> LaunchError:
    """The error to show: what a rank recorded as its own, else how the first one to go ended."""
    rank, observed = error.get_first_failure()
    recorded = first_failure(folder)
    if recorded is not None and (not recorded.consequence or recorded.error == "RankFailedError"):
        return LaunchError(recorded.sentence, recorded.trace, recorded.error)
    if observed.exitcode < 0:
        return LaunchError(
            f"rank {rank} was killed by {observed.signal_name()}; the other ranks have been ended"
        )
    if recorded is None or recorded.rank != rank:
        return LaunchError(exit_sentence(rank, observed.exitcode))
    return LaunchError(
        f"rank {rank} lost contact with another rank, which ended without an error before its work was done",
        recorded.trace,
    )


@contextlib.contextmanager
def _quiet_launcher(debug: bool) -> Iterator[None]:
    # torch.distributed.elastic logs a failure with stack traces and a banner; the error says it in one line.
    previous = logging.root.manager.disable
    if not debug:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)
