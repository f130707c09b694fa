"""``tp-mamba shard``: write one file of weights per rank, which loads without reading the others."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tp_mamba.launch.arguments import add_checkpoint, positive_int
from tp_mamba.launch.console import progress_bar, show_written

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = False
HELP = "split a checkpoint into one file per rank, which loads without reading the others"
EXAMPLES = """\
  tp-mamba shard ./mamba-2.8b-hf ./mamba-2.8b-tp4 --tp 4
  tp-mamba generate ./mamba-2.8b-tp4 --tp 4 --prompt "The sea"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_checkpoint(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--tp", type=positive_int, required=True, metavar="N", help="number of files; no rank is started"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that OUT holds, if any"
    )


def prepare(args: argparse.Namespace) -> None:
    """Find the checkpoint; a model name is downloaded, once it is sure that OUT may be written."""
    from tp_mamba.checkpoint.location import resolve
    from tp_mamba.checkpoint.replace import refuse_taken

    refuse_taken(args.out, args.checkpoint, overwrite=args.overwrite)
    args.checkpoint = str(resolve(args.checkpoint))


def run(args: argparse.Namespace, tp: TensorParallel | None) -> int:
    """Write the files, then say what was written."""
    from tp_mamba.checkpoint.shards import shard_checkpoint

    start = time.perf_counter()
    with progress_bar(not args.json) as progress:
        shard_checkpoint(args.checkpoint, args.out, args.tp, progress, overwrite=args.overwrite)
    show_written(Path(args.out), time.perf_counter() - start, {"ranks": args.tp}, as_json=args.json)
    return 0
