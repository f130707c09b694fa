"""A benchmark's command on every rank that torchrun started: one table, one seed, one number of runs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import secrets
from collections.abc import Sequence

from benchmarks import runner
from benchmarks.case import Case
from benchmarks.ceilings import H200
from tp_mamba.parallel.group import TensorParallel


@functools.cache
def ranks() -> TensorParallel:
    """Those that torchrun started, or the one that this process is."""
    return TensorParallel.from_env()


def agree(mine: bool) -> bool:
    """Rank 0's answer, on every rank: clocks differ, and ranks that run a step differently often wait for ever."""
    return bool(ranks().broadcast_object(mine))


def run(name: str, cases: Sequence[Case], options: argparse.Namespace, *, goals: str = H200.hardware) -> int:
    """As :func:`benchmarks.runner.run`, on every rank; rank 0 tells and writes."""
    tp = ranks()
    options.seed = tp.broadcast_object(secrets.randbelow(2**31) if options.seed is None else options.seed)
    with contextlib.ExitStack() as quiet:
        if tp.rank > 0:
            options.json = None
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        return runner.run(name, cases, options, tp.device, goals=goals)
