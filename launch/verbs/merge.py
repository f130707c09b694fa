"""``tp-mamba merge``: write one full checkpoint in the -hf layout, from per-rank files or any other layout."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tp_mamba.launch.console import progress_bar, show_written

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = False
HELP = "restore the full checkpoint from the files of `tp-mamba shard`, or convert another layout to -hf's"
EXAMPLES = """\
  tp-mamba merge ./mamba-2.8b-tp4 ./mamba-2.8b-hf
  tp-mamba merge ./mamba-2.8b ./mamba-2.8b-hf         from the original state-spaces layout, a .bin, to safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder written by `tp-mamba shard`, or any other checkpoint folder or Hugging Face model name",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that OUT holds, if any"
    )


def prepare(args: argparse.Namespace) -> None:
    """Nothing to do before the work: no rank is started."""


def run(args: argparse.Namespace, tp: TensorParallel | None) -> int:
    """Write the full checkpoint, then say what was written."""
    from tp_mamba.checkpoint.shards import merge_checkpoint

    start = time.perf_counter()
    with progress_bar(not args.json) as progress:
        merge_checkpoint(args.checkpoint, args.out, progress, overwrite=args.overwrite)
    show_written(Path(args.out), time.perf_counter() - start, {}, as_json=args.json)
    return 0
