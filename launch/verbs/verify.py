"""``tp-mamba verify``: are the logits of a checkpoint right, at every number of ranks?"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import add_checkpoint, add_device, positive_int, rank_counts, tolerance
from tp_mamba.launch.console import print_json, show, table
from tp_mamba.launch.prompts import read_prompts, share_prompts
from tp_mamba.launch.ranks.failures import UsageError, under_torchrun
from tp_mamba.launch.ranks.start import (
    check_device,
    check_device_arguments,
    check_ranks,
    make_tensor_parallel,
    resolve_rank_count,
    start_ranks,
)

if TYPE_CHECKING:
    import torch

    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = False
HELP = "compare the float32 logits at several numbers of ranks with transformers, or with one rank"
EXAMPLES = """\
  tp-mamba verify ./mamba-130m-hf                     1, 2 and 4 ranks against transformers, if installed
  tp-mamba verify ./mamba-130m-hf --tp 8 --against single
  tp-mamba verify ./mamba-130m-hf --prompt "The sea" --tolerance 1e-5 --json
  torchrun --nproc-per-node 4 -m tp_mamba.launch verify ./mamba-130m-hf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_checkpoint(parser)
    parser.add_argument(
        "--tp",
        type=rank_counts,
        metavar="N,N,...",
        help="numbers of ranks to try (default 1,2,4, as far as there are GPUs; under torchrun, its own)",
    )
    add_device(parser)
    parser.add_argument(
        "--against",
        choices=("auto", "transformers", "single"),
        default="auto",
        help="what to compare with: one full forward of transformers on a CPU, or one rank (default: "
        "transformers if it is installed and can read the checkpoint)",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default=1e-4,
        metavar="X",
        help="largest error allowed, of the largest logit (default 1e-4)",
    )
    parser.add_argument(
        "--tokens", type=positive_int, metavar="N", help="length of the random input (default 64)"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="compare on this text instead of random token ids; - reads standard input",
    )
    parser.add_argument("--tokenizer", metavar="PATH_OR_NAME", help="where tokenizer.json is, for --prompt")


def prepare(args: argparse.Namespace) -> None:
    """Choose sizes and reference; refuse what cannot be compared."""
    check_device_arguments(args.device, args.backend)
    if args.tokens is not None and args.prompt is not None:
        raise UsageError("both --tokens and --prompt were given: choose random ids or a text")
    if args.tokenizer is not None and args.prompt is None:
        raise UsageError(
            "--tokenizer was given without --prompt: random token ids need none, add --prompt TEXT or leave it out"
        )
    if under_torchrun():
        asked = args.tp[0] if args.tp and len(args.tp) == 1 else None
        if args.tp and asked is None:
            raise UsageError(
                f"--tp {','.join(map(str, args.tp))} under torchrun, which has started one number of ranks: "
                "leave --tp out"
            )
        args.sizes = [resolve_rank_count(asked, args.device)]
    else:
        args.sizes = args.tp or default_sizes(args.device, args.backend)
        if args.prompt is not None:
            (args.prompt,) = read_prompts([args.prompt], [])
    from tp_mamba.checkpoint.location import resolve

    check_device(args.device, args.backend, max(args.sizes))
    args.checkpoint = str(resolve(args.checkpoint))
    check_ranks(args.checkpoint, max(args.sizes))
    args.reference = _choose_reference(args.against, Path(args.checkpoint))


def default_sizes(device: str | None, backend: str | None) -> list[int]:
    """1, 2 and 4 ranks; of GPUs, which are taken where there are any, as many as there are."""
    import torch

    gpus = 0 if device == "cpu" or backend == "gloo" else torch.cuda.device_count()
    return [size for size in (1, 2, 4) if size <= gpus or not gpus]


def _choose_reference(against: str, folder: Path) -> str:
    from tp_mamba.checkpoint.files import CONFIG, MANIFEST
    from tp_mamba.config import MambaConfig

    MambaConfig.from_pretrained(folder)  # a damaged config.json is refused here, in its own words
    if against == "single":
        return "single"
    # Raw state-spaces files name no model type; per-rank files are this package's own.
    published = "model_type" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    readable = published and not (folder / MANIFEST).exists()
    installed = find_spec("transformers") is not None
    if against == "auto":
        return "transformers" if readable and installed else "single"
    if not installed:
        raise ValueError(
            '--against transformers, which is not installed: pip install "tp-mamba[verify]", '
            "or use --against single"
        )
    if not readable:
        raise ValueError(
            f"--against transformers, which cannot read the layout of {folder}: use --against single, "
            "or give a checkpoint in the -hf layout"
        )
    return "transformers"


def input_ids(args: argparse.Namespace) -> torch.Tensor:
    """The compared input ``[1, L]``: the prompt's ids, or seeded random ones, the same on every rank."""
    import torch

    from tp_mamba.config import MambaConfig
    from tp_mamba.text.tokenizer import load_tokenizer

    if args.prompt is not None:
        ids = load_tokenizer(args.tokenizer or args.checkpoint).encode(args.prompt).ids
        if not ids:
            raise ValueError("--prompt gives no tokens: give it at least one character")
        return torch.tensor([ids])
    config = MambaConfig.from_pretrained(args.checkpoint)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        config.usable_vocab_size or config.vocab_size, (1, args.tokens or 64), generator=generator
    )


def our_logits(args: argparse.Namespace, tp: TensorParallel) -> torch.Tensor:
    """Float32 logits ``[L, V]`` on the CPU; every rank calls this."""
    import torch

    from tp_mamba.model import MambaForCausalLM

    model = MambaForCausalLM.from_pretrained(args.checkpoint, tp=tp, dtype=torch.float32, device=tp.device)
    with torch.inference_mode():
        return model(input_ids(args))[0].cpu()


def rank_logits(args: argparse.Namespace, out: str) -> None:
    """One of several ranks: rank 0 leaves the logits in the file ``out``."""
    import torch

    tp = make_tensor_parallel(args.device, args.backend)
    logits = our_logits(args, tp)
    if tp.rank == 0:
        torch.save(logits, out)


def transformers_logits(args: argparse.Namespace) -> torch.Tensor:
    """The oracle, float32 ``[L, V]``: one full forward on the CPU, without a cache.

    A CPU is where transformers takes its plain torch path; its own cached continuation of several tokens is
    not a reference for Mamba-1.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids(args), use_cache=False).logits[0].float()


def compare(logits: torch.Tensor, reference: torch.Tensor, tolerance: float) -> dict[str, Any]:
    """Largest error relative to the reference's largest logit, share of equal greedy tokens, verdict."""
    error = float((logits - reference).abs().max() / reference.abs().max())
    agreement = float((logits.argmax(-1) == reference.argmax(-1)).float().mean())
    # A NaN is within no tolerance, and not valid JSON.
    return {
        "error": error if math.isfinite(error) else None,
        "greedy_agreement": agreement,
        "ok": error <= tolerance,
    }


def run(args: argparse.Namespace, tp: TensorParallel | None) -> int:
    """Compare every size and print the verdicts; 1 if any is above the tolerance."""
    if under_torchrun():
        tp = make_tensor_parallel(args.device, args.backend)
        if args.prompt is not None:
            (args.prompt,) = share_prompts([args.prompt], [], tp)
        logits = our_logits(args, tp)
        verdicts = (
            [{"ranks": tp.size, **compare(logits, _reference(args), args.tolerance)}] if tp.rank == 0 else []
        )
        verdicts = tp.broadcast_object(verdicts)
    else:
        reference = _reference(args)
        verdicts = [
            {"ranks": size, **compare(_logits_of(args, size), reference, args.tolerance)}
            for size in args.sizes
        ]
    if tp is None or tp.rank == 0:
        _print(args, verdicts)
    return 0 if all(verdict["ok"] for verdict in verdicts) else 1


def _reference(args: argparse.Namespace) -> torch.Tensor:
    from tp_mamba.parallel.group import TensorParallel

    if args.reference == "transformers":
        return transformers_logits(args)
    return our_logits(args, TensorParallel(device=args.device))


def _logits_of(args: argparse.Namespace, size: int) -> torch.Tensor:
    import torch

    if size == 1:
        return our_logits(args, make_tensor_parallel(args.device, args.backend))
    with tempfile.TemporaryDirectory(prefix="tp-mamba-") as folder:
        out = str(Path(folder) / "logits.pt")
        start_ranks(rank_logits, args, out, size=size)
        return torch.load(out, weights_only=True)


def _print(args: argparse.Namespace, verdicts: list[dict[str, Any]]) -> None:
    if args.json:
        ok = all(verdict["ok"] for verdict in verdicts)
        print_json(
            {
                "checkpoint": args.checkpoint,
                "against": args.reference,
                "tolerance": args.tolerance,
                "sizes": verdicts,
                "ok": ok,
            }
        )
        return
    rows = [
        (
            verdict["ranks"],
            "not a number" if verdict["error"] is None else f"{verdict['error']:.1e}",
            f"{verdict['greedy_agreement']:.1%}",
            "ok" if verdict["ok"] else "FAILED",
        )
        for verdict in verdicts
    ]
    against = "transformers" if args.reference == "transformers" else "one rank"
    title = f"{args.checkpoint}, float32 logits against {against}, tolerance {args.tolerance:g}"
    columns = ("ranks", "max error / max logit", "greedy agreement", "verdict")
    show(title, table(columns, rows), to_stdout=True)
