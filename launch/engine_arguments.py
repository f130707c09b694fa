"""Arguments of the verbs that run an engine over tensor-parallel ranks, and what is checked of them before any starts.

Nothing here imports torch before a checkpoint is looked for.
"""

from __future__ import annotations

import argparse

from tp_mamba.launch.arguments import DTYPES, add_device, fraction, positive_int, rank_count
from tp_mamba.launch.ranks.failures import UsageError
from tp_mamba.launch.ranks.start import check_device, check_device_arguments, check_ranks, resolve_rank_count

ENGINE_ARGUMENTS = ("dtype", "device", "max_batch_size", "max_prefill_tokens", "memory_fraction", "eager")
"""Those of :func:`add_engine_arguments` that every rank must have alike."""

PREFIX_ARGUMENTS = ("enable_prefix_caching", "mamba_block_size")
"""As :data:`ENGINE_ARGUMENTS`, of a verb that keeps states."""


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """``--tokenizer`` of the verbs whose texts need one."""
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_NAME",
        help="where tokenizer.json is, if it is not with the checkpoint",
    )


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, batch_size: str, keeps_states: bool = True
) -> None:
    """How much is done at a time, how, and on which ranks.

    Args:
        batch_size: what ``--max-batch-size`` counts, and its default, for ``--help``.
        keeps_states: whether the verb has a prefix cache.
    """
    memory = parser.add_argument_group("memory (a number that does not fit is lowered, and a note says so)")
    memory.add_argument("--max-batch-size", type=positive_int, metavar="N", help=batch_size)
    memory.add_argument(
        "--max-prefill-tokens",
        type=positive_int,
        default=8192,
        metavar="N",
        help="prompt tokens that a step takes in, longer prompts take several (default 8192)",
    )
    memory.add_argument(
        "--memory-fraction",
        type=fraction,
        default=0.9,
        metavar="X",
        help="part of the free memory that weights, activations and states may take together (default 0.9)",
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="launch every kernel from the host instead of capturing steps in CUDA graphs; on a CPU it is always so",
    )
    if keeps_states:
        alike = parser.add_argument_group("prompts that begin alike")
        alike.add_argument(
            "--enable-prefix-caching",
            action="store_true",
            help="keep the states behind prompts and texts: a later prompt that begins like them computes its rest "
            "alone",
        )
        alike.add_argument(
            "--mamba-block-size",
            type=positive_int,
            metavar="N",
            help="with --enable-prefix-caching: prompt tokens between two kept states (default 2048)",
        )
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument(
        "--tp",
        type=rank_count,
        metavar="N",
        help='tensor-parallel ranks to start (default 1); "auto": one for each GPU',
    )
    add_device(ranks)
    ranks.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's)")


def check_prefix_caching(args: argparse.Namespace) -> None:
    """Refuse a distance between kept states where none is kept."""
    if args.mamba_block_size is not None and not args.enable_prefix_caching:
        raise UsageError(
            "--mamba-block-size was given without --enable-prefix-caching: it is about states that are kept with that"
        )


def place_ranks(args: argparse.Namespace) -> int:
    """How many ranks there are to be; refuses a device or backend that they cannot have."""
    check_device_arguments(args.device, args.backend)
    size = resolve_rank_count(args.tp, args.device)
    check_device(args.device, args.backend, size)
    return size


def resolve_checkpoint(args: argparse.Namespace, size: int) -> None:
    """Make ``args.checkpoint`` a folder, by a download where it is a name, and refuse ranks that cannot share it."""
    from tp_mamba.checkpoint.location import resolve

    args.checkpoint = str(resolve(args.checkpoint))
    check_ranks(args.checkpoint, size)
