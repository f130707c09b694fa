"""``tp-mamba verify``: are the logits of a checkpoint right, at every number of ranks?"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import add_checkpoint, add_device, positive_int, rank_counts, tolerance
from tp_mamba.launch.console import human_bytes, print_json, show, table, tell
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

LEAST_TOLERANCE = 4e-6
"""A reference may be nearer to float64 than float32 promises: some thirty roundings of float32 are no error."""

FIXED_TOLERANCE = 1e-4
"""Where float64 does not fit into memory; models of some 24 layers with random weights may need more."""


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
        "transformers if it is installed and reads the checkpoint whole)",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="X",
        help="largest error allowed, of the largest logit (default: twice the float32 error of what is compared with)",
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


def input_ids(args: argparse.Namespace) -> list[int]:
    """The compared input: the prompt's ids, or seeded random ones."""
    import torch

    from tp_mamba.config import MambaConfig
    from tp_mamba.text.tokenizer import load_tokenizer

    if args.prompt is not None:
        ids = load_tokenizer(args.tokenizer or args.checkpoint).encode(args.prompt).ids
        if not ids:
            raise ValueError("--prompt gives no tokens: give it at least one character")
        return ids
    config = MambaConfig.from_pretrained(args.checkpoint)
    size = config.usable_vocab_size or config.vocab_size
    return torch.randint(size, (args.tokens or 64,), generator=torch.Generator().manual_seed(0)).tolist()


def our_logits(args: argparse.Namespace, tp: TensorParallel, dtype: torch.dtype) -> torch.Tensor:
    """Logits ``[L, V]`` in float64 on the CPU, computed in ``dtype``; every rank calls this."""
    import torch

    from tp_mamba.launch.agreement import agree_on_arguments, agree_on_weights
    from tp_mamba.model import MambaForCausalLM

    agree_on_arguments(tp, args, ("tokens", "device"))
    model = MambaForCausalLM.from_pretrained(args.checkpoint, tp=tp, dtype=dtype, device=tp.device)
    agree_on_weights(tp, model)
    with torch.inference_mode():
        return model(torch.tensor([args.ids]).to(tp.device))[0].cpu().double()


def rank_logits(args: argparse.Namespace, out: str) -> None:
    """One of several ranks: rank 0 leaves the logits in the file ``out``."""
    import torch

    tp = make_tensor_parallel(args.device, args.backend)
    logits = our_logits(args, tp, torch.float32)
    if tp.rank == 0:
        torch.save(logits, out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What logits are compared with, and how near to it they have to be."""

    name: str
    """``"transformers"`` or ``"single"``."""
    logits: torch.Tensor
    """``[L, V]``: transformers' in float64, or one rank's in float32."""
    own_error: float | None
    """How far the reference's own float32 logits are from float64, of the largest logit; None if that is not known."""
    tolerance: float


def make_reference(args: argparse.Namespace) -> Reference:
    """Compute what to compare with, and how exact float32 is for this model on this input.

    A fixed bound would hold for some models alone: rounding grows with depth and width. So the bound is twice the
    error that the reference itself has in float32.

    Raises:
        ValueError: ``--against transformers``, which does not load the checkpoint whole.
    """
    import torch

    from tp_mamba.launch.oracle import OracleError, transformers_logits
    from tp_mamba.parallel.group import TensorParallel

    exact = None
    knows = float64_fits(args)
    if args.reference == "transformers":
        try:
            ids = torch.tensor([args.ids])
            own = transformers_logits(args.checkpoint, ids, torch.float32).double()
            if knows:
                exact = transformers_logits(args.checkpoint, ids, torch.float64)
            return _reference(args, "transformers", own if exact is None else exact, own, exact)
        except OracleError as error:
            if args.against == "transformers":
                raise ValueError(f"--against transformers, but {error}: use --against single") from None
            tell(args.verb, "note", f"{error}; compared with one rank instead")
    own = our_logits(args, TensorParallel(device=args.device), torch.float32)
    if knows:
        exact = our_logits(args, TensorParallel(device="cpu"), torch.float64)
    return _reference(args, "single", own, own, exact)


def _reference(
    args: argparse.Namespace, name: str, logits: torch.Tensor, own: torch.Tensor, exact: torch.Tensor | None
) -> Reference:
    own_error = None if exact is None else error_of(own, exact)
    derived = (
        FIXED_TOLERANCE if own_error is None else max(LEAST_TOLERANCE, 2 * own_error)
    )  # in this order also for a NaN
    bound = derived if args.tolerance is None else args.tolerance
    return Reference(name=name, logits=logits, own_error=own_error, tolerance=bound)


def float64_fits(args: argparse.Namespace) -> bool:
    """Whether this host's memory holds the whole model in float64; a note says so if it does not."""
    import torch

    from tp_mamba.config import MambaConfig
    from tp_mamba.engine.memory import free_memory
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.parallel.sharding import sharded_tensors

    model = MambaForCausalLM(MambaConfig.from_pretrained(args.checkpoint), device="meta")
    needed = 8 * sum(math.prod(tensor.shard.shape) for tensor in sharded_tensors(model))
    free = free_memory(torch.device("cpu"))
    if free is None or needed < free:
        return True
    tell(
        args.verb,
        "note",
        f"float64 takes {human_bytes(needed)} and {human_bytes(free)} are free: compared with float32, within "
        f"{FIXED_TOLERANCE:g}",
    )
    return False


def error_of(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, of the reference's largest logit."""
    return float((logits - reference).abs().max() / reference.abs().max())


def _finite(error: float | None) -> float | None:
    """``error``, None for a NaN, which is within no tolerance and not valid JSON."""
    return error if error is not None and math.isfinite(error) else None


def compare(logits: torch.Tensor, reference: torch.Tensor, tolerance: float) -> dict[str, Any]:
    """Largest error relative to the reference's largest logit, share of equal greedy tokens, verdict."""
    error = error_of(logits, reference)
    agreement = float((logits.argmax(-1) == reference.argmax(-1)).float().mean())
    return {
        "error": _finite(error),
        "greedy_agreement": agreement,
        "ok": error <= tolerance,
    }


def run(args: argparse.Namespace, tp: TensorParallel | None) -> int:
    """Compare every size and print the verdicts; 1 if any is above the tolerance."""
    import torch

    if under_torchrun():
        tp = make_tensor_parallel(args.device, args.backend)
        if args.prompt is not None:
            (args.prompt,) = share_prompts([args.prompt], [], tp)
        with tp.agreed():
            args.ids = input_ids(args) if tp.rank == 0 else []
        args.ids = tp.broadcast_object(args.ids)
        logits = our_logits(args, tp, torch.float32)
        report: dict[str, Any] = {}
        with tp.agreed():
            if tp.rank == 0:
                report = _report(args, make_reference(args), {tp.size: logits})
        report = tp.broadcast_object(report)
    else:
        args.ids = input_ids(args)
        reference = make_reference(args)
        report = _report(args, reference, {size: _logits_of(args, size) for size in args.sizes})
    if tp is None or tp.rank == 0:
        if args.json:
            print_json(report)
        else:
            _print(report)
    return 0 if report["ok"] else 1


def _logits_of(args: argparse.Namespace, size: int) -> torch.Tensor:
    import torch

    if size == 1:
        return our_logits(args, make_tensor_parallel(args.device, args.backend), torch.float32)
    with tempfile.TemporaryDirectory(prefix="tp-mamba-") as folder:
        out = str(Path(folder) / "logits.pt")
        start_ranks(rank_logits, args, out, size=size)
        return torch.load(out, weights_only=True)


def _report(
    args: argparse.Namespace, reference: Reference, logits_of: dict[int, torch.Tensor]
) -> dict[str, Any]:
    verdicts = [
        {"ranks": size, **compare(logits, reference.logits, reference.tolerance)}
        for size, logits in logits_of.items()
    ]
    return {
        "checkpoint": args.checkpoint,
        "against": reference.name,
        "reference_error": _finite(reference.own_error),
        "tolerance": reference.tolerance,
        "sizes": verdicts,
        "ok": all(verdict["ok"] for verdict in verdicts),
    }


def _print(report: dict[str, Any]) -> None:
    rows = [
        (
            verdict["ranks"],
            _figure(verdict["error"]),
            f"{verdict['greedy_agreement']:.1%}",
            "ok" if verdict["ok"] else "FAILED",
        )
        for verdict in report["sizes"]
    ]
    whose = "transformers" if report["against"] == "transformers" else "one rank"
    exact = report["reference_error"] is not None
    title = f"{report['checkpoint']}, float32 logits against {whose}"
    title += " in float64" if exact and whose == "transformers" else ""
    bound = f"tolerance {report['tolerance']:.1e}"
    if exact:
        bound += f"; in float32 {whose} itself is {_figure(report['reference_error'])} from float64"
    columns = ("ranks", "max error / max logit", "greedy agreement", "verdict")
    show(title, bound, table(columns, rows), to_stdout=True)


def _figure(error: float | None) -> str:
    return "not a number" if error is None else f"{error:.1e}"
