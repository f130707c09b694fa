"""The ``tp-mamba`` command with a fault in one rank, for test_generate_verb.py and test_torchrun_errors.py.

    python faulty_command.py VICTIM loading|generating FAULT <arguments of tp-mamba>

Started ranks import the main script again, so the fault is planted at import; it strikes where RANK says.
"""

from __future__ import annotations

import os
import sys

from rank_jobs import meet, sleep_through

import tp_mamba.model
from tp_mamba.launch import cli
from tp_mamba.model import MambaForCausalLM

VICTIM, PLACE, FAULT, *ARGUMENTS = sys.argv[1:]
STEP = int(os.environ.get("FAULT_STEP", "3"))
"""Forward pass in which a fault "while generating" strikes."""

steps = 0
load_model = tp_mamba.model.load_model
forward_packed = MambaForCausalLM.forward_packed


def faulty_load_model(*args: object, **options: object) -> None:
    """Load, unless this rank is the victim."""
    if os.environ.get("RANK") == VICTIM and PLACE == "loading":
        meet(FAULT)
    load_model(*args, **options)


def faulty_forward_packed(self: MambaForCausalLM, *args: object, **kwargs: object) -> object:
    """One forward pass, unless this rank is the victim and the time has come."""
    global steps
    steps += 1
    if PLACE == "generating" and steps == STEP:
        if os.environ.get("RANK") == VICTIM:
            meet(FAULT)
        elif FAULT == "kill unnoticed":
            sleep_through()
    return forward_packed(self, *args, **kwargs)


tp_mamba.model.load_model = faulty_load_model
MambaForCausalLM.forward_packed = faulty_forward_packed

if __name__ == "__main__":
    sys.exit(cli.main(ARGUMENTS))
