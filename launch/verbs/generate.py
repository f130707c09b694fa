"""``tp-mamba generate``: continue one prompt or several, on one rank or many."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch.arguments import add_checkpoint, logit_bias, sampling
from tp_mamba.launch.console import facts, human_bytes, print_json, show
from tp_mamba.launch.engine_arguments import (
    ENGINE_ARGUMENTS,
    PREFIX_ARGUMENTS,
    add_engine_arguments,
    add_tokenizer,
    check_prefix_caching,
    place_ranks,
    resolve_checkpoint,
)
from tp_mamba.launch.jsonl.arguments import add_file_arguments, check_file_arguments, examine_files
from tp_mamba.launch.output import Output
from tp_mamba.launch.prompts import check_prompt_arguments, read_prompts, share_prompts
from tp_mamba.launch.ranks.failures import under_torchrun

if TYPE_CHECKING:
    from rich.table import Table

    from tp_mamba.engine.graphs import CaptureReport
    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = True
FIELDS = tuple(
    field
    for field in SamplingParams.__dataclass_fields__
    if field not in ("n", "logprobs", "prompt_logprobs", "prompt_logprobs_start")
)
"""Those of SamplingParams that are arguments; the others are for the lines of a file alone, whose results show them."""

HELP = "continue one prompt or several; the text appears as it is made"
EXAMPLES = """\
  tp-mamba generate ./mamba-130m-hf --prompt "The sea"
  tp-mamba generate state-spaces/mamba-130m-hf --tp auto --dtype bfloat16 --prompt "The sea"
  tp-mamba generate ./mamba-130m-hf --tp 2 --temperature 0.8 --top-p 0.95 --seed 7 --prompt "The sea"
  tp-mamba generate ./mamba-130m-hf --prompt "The sea" --prompt "The land" --max-new-tokens 32
  tp-mamba generate ./falcon-mamba-7b-instruct --chat --prompt "Why is the sea salty?"
  tp-mamba generate ./mamba-130m-hf --prompts requests.jsonl --output results.jsonl
  echo "The sea" | tp-mamba generate ./mamba-130m-hf --prompt - --json
  torchrun --nproc-per-node 2 -m tp_mamba.launch generate ./mamba-130m-hf --prompt "The sea"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_checkpoint(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be repeated; - reads standard input (under torchrun, that of rank 0)",
    )
    parser.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file in UTF-8 whose whole text is one more prompt; may be repeated",
    )
    add_file_arguments(parser)
    add_tokenizer(parser)
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is what a user says: put it into the checkpoint's chat template, and print the answer alone",
    )
    add_engine_arguments(
        parser,
        batch_size="prompts that run at a time, the others wait (default: all, 256 of a file of --prompts)",
    )
    add_sampling(parser.add_argument_group("sampling (in float32 the same text at every number of ranks)"))


def add_sampling(group: argparse._ActionsContainer) -> None:
    """The arguments that become SamplingParams, with its limits and defaults."""
    numbers: tuple[tuple[str, type[int] | type[float], str, str], ...] = (
        ("max_new_tokens", int, "N", "default 128"),
        ("temperature", float, "X", "0, the default, is greedy"),
        ("top_k", int, "K", "sample among the K likeliest; 0: all"),
        ("top_p", float, "P", "smallest set of likeliest tokens of mass P"),
        ("min_p", float, "P", "drop tokens below P times the likeliest"),
        ("repetition_penalty", float, "X", "above 1: repeat less"),
        ("presence_penalty", float, "X", "taken from the logits of tokens that the text holds"),
        ("frequency_penalty", float, "X", "taken from them once for each time that it does"),
        ("min_tokens", int, "N", "do not end before so many tokens"),
        ("seed", int, "N", "default 0"),
    )
    for field, parse, metavar, text in numbers:
        name, default = f"--{field.replace('_', '-')}", SamplingParams.__dataclass_fields__[field].default
        checked = parse if field == "min_tokens" else sampling(field, parse)  # its limit is another argument
        group.add_argument(name, type=checked, default=default, metavar=metavar, help=text)
    several: tuple[tuple[str, str, type[int] | type[str], str, str], ...] = (
        ("stop", "--stop", str, "TEXT", "end before this text; may be repeated"),
        ("stop_token_ids", "--stop-token-id", int, "ID", "end at this token; may be repeated"),
    )
    for field, name, kind, metavar, text in several:
        group.add_argument(
            name,
            dest=field,
            action="append",
            type=sampling(field, kind),
            default=[],
            metavar=metavar,
            help=text,
        )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=logit_bias,
        default=[],
        metavar="ID=X",
        help="added to the logit of this token; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")


def prepare(args: argparse.Namespace) -> None:
    """Read the prompts, or look at the files, and check the sampling parameters, before any rank starts.

    Where torchrun has started the ranks already, the prompts are read in :func:`run`, by rank 0.
    """
    check_file_arguments(args)
    check_prefix_caching(args)
    if args.prompts is None:
        check_prompt_arguments(args.prompt, args.prompt_file)
    size = place_ranks(args)
    args.texts = args.found = None
    if not under_torchrun():
        if args.prompts is None:
            args.texts = read_prompts(args.prompt, args.prompt_file)
        else:
            args.found = examine_files(args)
    given = {field: getattr(args, field) for field in FIELDS}
    args.params = SamplingParams(**given)
    resolve_checkpoint(args, size)


def run(args: argparse.Namespace, tp: TensorParallel) -> int:
    """Load this rank's part of the model and generate; rank 0 prints."""
    from tp_mamba.engine.generate import stream
    from tp_mamba.launch.agreement import agree_on_arguments
    from tp_mamba.launch.jsonl.command import run_file
    from tp_mamba.launch.loading import (
        cache_config_of,
        describe,
        limits_before_loading,
        load_encoder,
        load_model,
    )

    agree_on_arguments(tp, args, (*FIELDS, *ENGINE_ARGUMENTS, *PREFIX_ARGUMENTS, "chat", "prompts"))
    if args.prompts is not None:
        return run_file(args, tp)
    prompts = args.texts or share_prompts(args.prompt, args.prompt_file, tp)
    encoder, tokenizer = load_encoder(args, tp)
    prompt_ids = [encoder(prompt) for prompt in prompts]
    limits = limits_before_loading(args, tp, at_most=len(prompts))
    model, _ = load_model(args, tp)
    speaks = tp.rank == 0 and not args.json
    output = Output(prompts, speaks, echo=not args.chat)
    events = stream(
        model,
        prompt_ids,
        args.params,
        tokenizer,
        eager=args.eager,
        cache_config=cache_config_of(args),
        **limits,
    )
    output.follow(events)
    report = {
        **describe(model),
        "prompt_tokens": sum(map(len, prompt_ids)),
        "reused_prompt_tokens": events.reused_tokens,
        **output.timing(),
    }
    if speaks:
        show(_summary(report, events.captured))
    elif tp.rank == 0:
        print_json({"results": output.results(), **report})
    if output.errors:
        raise RuntimeError("; ".join(output.errors))
    return 0


def _summary(report: dict[str, Any], captured: CaptureReport) -> Table:
    steps = f"{captured.graphs} captured as CUDA graphs, in {captured.seconds:.2f} s"
    sizes: list[int] = report["bytes_per_rank"]
    reused: int = report["reused_prompt_tokens"]
    rate = report["tokens_per_second"]
    return facts(
        [
            (
                "ranks",
                f"{report['ranks']} x {report['device']}, backend {report['backend']}, {report['dtype']}",
            ),
            ("parameters", f"{report['parameters']:,} in all; {human_bytes(max(sizes))} a rank"),
            (
                "prompt",
                f"{report['prompt_tokens']} tokens"
                + (f", {reused} of them from kept states" if reused else "")
                + f", first new token after {report['prefill_seconds']:.2f} s",
            ),
            (
                "generated",
                f"{report['new_tokens']} tokens" + (f", {rate:.1f} tokens/s" if rate is not None else ""),
            ),
            *([("steps", steps)] if captured.graphs else []),
        ],
    )
