"""The arguments of ``tp-mamba generate`` that are about files of requests and results. Nothing here imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from tp_mamba.launch.jsonl.results import Found, examine
from tp_mamba.launch.ranks.failures import UsageError


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """``--prompts``, ``--output``, ``--resume`` and ``--overwrite``."""
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='requests, one JSON object per line: "prompt" or "prompt_token_ids", and any sampling option under its '
        'name in Python ("max_new_tokens"), else as given here; other fields, such as an id, come back with the result',
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="takes the results of --prompts, one JSON object per line, in their order, each as soon as it is there",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier run was stopped, with the same --prompts and settings; --output need not exist",
    )
    existing.add_argument("--overwrite", action="store_true", help="drop the results that --output holds")


def check_file_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, without looking at a file.

    Raises:
        UsageError: there is a file without its counterpart, or a prompt beside them.
    """
    if args.prompts is None:
        given = [name for name in ("output", "resume", "overwrite") if getattr(args, name)]
        if given:
            raise UsageError(
                f"--{given[0]} was given without --prompts FILE: it is about the results of such a file"
            )
        return
    if args.prompt or args.prompt_file:
        raise UsageError("--prompts FILE was given beside another prompt: put that into a line of the file")
    if args.output is None:
        raise UsageError("--prompts was given without --output: name the file that takes the results")


def examine_files(args: argparse.Namespace) -> Found:
    """See :func:`tp_mamba.launch.jsonl.results.examine`."""
    return examine(Path(args.prompts), Path(args.output), resume=args.resume, overwrite=args.overwrite)
