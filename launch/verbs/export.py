"""``tp-mamba export``: a training run's checkpoint as a model that transformers and every verb loads."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tp_mamba.launch.arguments import DTYPES, torch_dtype
from tp_mamba.launch.console import show_written

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = False
HELP = "write the model of a training run as a checkpoint in transformers' layout"
EXAMPLES = """\
  tp-mamba export ./run ./my-mamba
  tp-mamba export ./run ./my-mamba --step last --dtype float32 --overwrite
  tp-mamba generate ./my-mamba --prompt "The sea"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("checkpoint", metavar="RUN", help="a folder that tp-mamba train has written")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--step",
        type=step,
        default="best",
        metavar="N",
        help='which checkpoint: a step, "last", or "best" by validation (the default; without validation the last)',
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (default bfloat16)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that OUT holds, if any"
    )


def step(text: str) -> int | str:
    """A number of steps, ``best`` or ``last``."""
    if text in ("best", "last"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'got {text!r}, expected a step, "best" or "last"')
    return int(text)


def prepare(args: argparse.Namespace) -> None:
    """Make sure that OUT may be written."""
    from tp_mamba.checkpoint.replace import refuse_taken

    refuse_taken(args.out, args.checkpoint, overwrite=args.overwrite)


def run(args: argparse.Namespace, tp: TensorParallel | None) -> int:
    """Write the checkpoint, then say what was written."""
    from tp_mamba.training.export import export_run

    start, dtype = time.perf_counter(), torch_dtype(args.dtype)
    assert dtype is not None
    report = export_run(Path(args.checkpoint), Path(args.out), step=args.step, dtype=dtype)
    show_written(Path(args.out), time.perf_counter() - start, report, as_json=args.json)
    return 0
