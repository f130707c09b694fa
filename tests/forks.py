"""Processes of the tests: copies of one that has imported already what they all need.

That import takes seconds of every process; a copy of what is imported takes none.
"""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing.context import ForkServerContext

IMPORTED = (
    "tp_mamba.model",
    "tp_mamba.training.trainer",
    "transformers.models.falcon_mamba.modeling_falcon_mamba",
    "transformers.models.mamba.modeling_mamba",
    "pytest",
)
"""None of them imports a Triton kernel of ours: a process may still choose to interpret those. None starts CUDA."""


def context() -> ForkServerContext:
    """A context of multiprocessing that forks a fresh process, not this one: no thread or lock comes along.

    Its processes have the environment variables of when the first of them was started.
    """
    found = mp.get_context("forkserver")
    found.set_forkserver_preload([*IMPORTED])
    return found
