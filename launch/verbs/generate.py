"""``tp-mamba generate``: continue one prompt or several, on one rank or many."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import (
    DTYPES,
    add_checkpoint,
    add_device,
    positive_int,
    rank_count,
    torch_dtype,
)
from tp_mamba.launch.console import facts, human_bytes, print_json, progress_bar, show
from tp_mamba.launch.output import Output
from tp_mamba.launch.prompts import check_prompt_arguments, read_prompts, share_prompts
from tp_mamba.launch.ranks.failures import under_torchrun
from tp_mamba.launch.ranks.start import check_device, check_ranks, resolve_rank_count

if TYPE_CHECKING:
    from rich.table import Table

    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = True
HELP = "continue one prompt or several; the text appears as it is made"
EXAMPLES = """\
  tp-mamba generate ./mamba-130m-hf --prompt "The sea"
  tp-mamba generate state-spaces/mamba-130m-hf --tp auto --dtype bfloat16 --prompt "The sea"
  tp-mamba generate ./mamba-130m-hf --tp 2 --temperature 0.8 --top-p 0.95 --seed 7 --prompt "The sea"
  tp-mamba generate ./mamba-130m-hf --prompt "The sea" --prompt "The land" --max-new-tokens 32
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
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_NAME",
        help="where tokenizer.json is, if it is not with the checkpoint",
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
    sampling = parser.add_argument_group("sampling (in float32 the same text at every number of ranks)")
    sampling.add_argument("--max-new-tokens", type=positive_int, default=128, metavar="N", help="default 128")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy"
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="smallest set of likeliest tokens of mass P"
    )
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest"
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less"
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    sampling.add_argument(
        "--stop-token-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="end at this token; may be repeated",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")


def prepare(args: argparse.Namespace) -> None:
    """Read the prompts and check the sampling parameters, before any rank starts.

    Where torchrun has started the ranks already, the prompts are read in :func:`run`, by rank 0.
    """
    from tp_mamba.checkpoint.location import resolve
    from tp_mamba.engine.params import SamplingParams

    check_device(args.device, args.backend)
    check_prompt_arguments(args.prompt, args.prompt_file)
    args.prompts = None if under_torchrun() else read_prompts(args.prompt, args.prompt_file)
    args.params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop_token_ids=tuple(args.stop_token_id),
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )
    # A model name is downloaded here, by one process.
    args.checkpoint = str(resolve(args.checkpoint))
    check_ranks(args.checkpoint, resolve_rank_count(args.tp, args.device))


def run(args: argparse.Namespace, tp: TensorParallel) -> int:
    """Load this rank's part of the model and generate; rank 0 prints."""
    from tp_mamba.engine.generate import stream
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.text.tokenizer import load_tokenizer

    prompts = args.prompts or share_prompts(args.prompt, args.prompt_file, tp)
    tokenizer = load_tokenizer(args.tokenizer or args.checkpoint, tp)
    prompt_ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    with progress_bar(tp.rank == 0) as progress:
        model = MambaForCausalLM.from_pretrained(
            args.checkpoint, tp=tp, dtype=torch_dtype(args.dtype), device=tp.device, progress=progress
        )
    speaks = tp.rank == 0 and not args.json
    output = Output(prompts, speaks)
    output.follow(stream(model, prompt_ids, args.params, tokenizer))
    report = {**describe(model), "prompt_tokens": sum(map(len, prompt_ids)), **output.timing()}
    if speaks:
        show(_summary(report))
    elif tp.rank == 0:
        print_json({"results": output.results(), **report})
    if output.errors:
        raise RuntimeError("; ".join(output.errors))
    return 0


def describe(model: MambaForCausalLM) -> dict[str, Any]:
    """What runs where: ranks, backend, device, dtype, parameters of the whole model, bytes on each rank."""
    from tp_mamba.parallel.sharding import sharded_tensors

    tensors = list(sharded_tensors(model))
    return {
        "ranks": model.tp.size,
        "backend": model.tp.backend,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(math.prod(tensor.shard.shape) for tensor in tensors),
        "bytes_per_rank": model.tp.all_gather_object(sum(tensor.param.nbytes for tensor in tensors)),
    }


def _summary(report: dict[str, Any]) -> Table:
    sizes: list[int] = report["bytes_per_rank"]
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
                f"{report['prompt_tokens']} tokens, first new token after {report['prefill_seconds']:.2f} s",
            ),
            (
                "generated",
                f"{report['new_tokens']} tokens" + (f", {rate:.1f} tokens/s" if rate is not None else ""),
            ),
        ],
    )
