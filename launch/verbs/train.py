"""``tp-mamba train``: train a model from scratch, or go on from a checkpoint, over data and tensor-parallel ranks."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import add_device, positive_int
from tp_mamba.launch.console import facts, print_json, show
from tp_mamba.launch.ranks.failures import UsageError, under_torchrun
from tp_mamba.launch.ranks.start import check_device, check_device_arguments
from tp_mamba.launch.training.arguments import add_data, add_model, add_run, add_settings, settings_of
from tp_mamba.launch.training.bar import step_bar

if TYPE_CHECKING:
    from tp_mamba.config import MambaConfig
    from tp_mamba.parallel.group import TensorParallel
    from tp_mamba.training.ranks import Ranks
    from tp_mamba.training.tokens import Tokens

USES_RANKS = True
HELP = "train a model from scratch or from a checkpoint, over data ranks times tensor-parallel ranks"
EXAMPLES = """\
  tp-mamba train --data shakespeare.txt --out ./run --hidden-size 256 --layers 6 --steps 1000
  tp-mamba train ./mamba-130m-hf --data notes.jsonl --out ./run --steps 200 --lr 1e-4      fine-tune
  tp-mamba train ./mamba-130m-hf --data notes.jsonl --out ./run --steps 200 --lr 1e-4 --tp 2 --dp 4
  tp-mamba train ./mamba-130m-hf --data notes.jsonl --out ./run --steps 400 --lr 1e-4 --resume
  tp-mamba export ./run ./my-mamba                                              what transformers loads
  torchrun --nproc-per-node 8 -m tp_mamba.launch.train ./mamba-2.8b-hf --tp 2 --data notes.jsonl --out ./run --steps 200

A step reads --batch-size rows of --sequence-length tokens. Documents are packed into the rows and never run into one
another. Ranks share the rows, so --tp and --dp change no loss, and a run may go on with others. RUN holds
step-*/ (the last --keep, and the best by validation), metrics.jsonl, and the files of the tokenizer.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="a model to go on from: a folder or a Hugging Face name; without one, a new model is made (see model)",
    )
    add_run(parser.add_argument_group("run"))
    add_data(parser.add_argument_group("data"))
    add_model(parser.add_argument_group("model, where no CHECKPOINT is given"))
    add_settings(parser.add_argument_group("training"))
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument(
        "--tp",
        type=positive_int,
        metavar="N",
        default=1,
        help="ranks that one model is split over (default 1)",
    )
    ranks.add_argument(
        "--dp",
        type=positive_int,
        metavar="M",
        help="data ranks (default 1; under torchrun, as many as there are models of --tp ranks)",
    )
    add_device(ranks)


def count_ranks(args: argparse.Namespace) -> int:
    """How many ranks there are to be.

    Raises:
        UsageError: torchrun has started another number.
    """
    if not under_torchrun():
        return args.tp * (args.dp or 1)
    world = int(os.environ["WORLD_SIZE"])
    if world % args.tp or (args.dp is not None and args.tp * args.dp != world):
        asked = f"--tp {args.tp}" + (f" --dp {args.dp}" if args.dp else "")
        raise UsageError(
            f"{asked} under torchrun with {world} ranks: their product must be the number of ranks, or leave --dp out"
        )
    return world


def prepare(args: argparse.Namespace) -> None:
    """Refuse what cannot work, and read the data into its cache, before any rank starts."""
    check_device_arguments(args.device, args.backend)
    size = count_ranks(args)
    args.settings = settings_of(args)
    args.settings.check_ranks(size // args.tp)
    check_device(args.device, args.backend, size)
    from tp_mamba.training.metrics import check_extras

    check_extras(tensorboard=args.tensorboard, plot=args.plot)
    if args.checkpoint is not None:
        from tp_mamba.checkpoint.location import resolve

        args.checkpoint = str(resolve(args.checkpoint))
    _refuse_run(args)
    _check_model(args)
    if not under_torchrun():
        read_data(args)  # the ranks find it in the cache


def run(args: argparse.Namespace, tp: TensorParallel) -> int:
    """Train; rank 0 shows how it goes and prints what came of it."""
    from tp_mamba.training.ranks import make_ranks
    from tp_mamba.training.saver import hold_run
    from tp_mamba.training.setup import write_tokenizer

    ranks = make_ranks(tp, args.tp)
    tp.same_everywhere(**{f"--{name.replace('_', '-')}": value for name, value in vars(args).items()})
    with ExitStack() as stack:
        with tp.agreed():
            if ranks.is_owner:
                stack.callback(os.close, hold_run(Path(args.out)))
                write_tokenizer(Path(args.out), _tokenizer_name(args), _folder(args))
        report = _train(args, ranks)
    if ranks.is_owner:
        _tell(report, as_json=args.json)
    return 0


def _train(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Make ready, go on where a run is to be resumed, train, and on rank 0 write what was asked for at the end."""
    import torch

    from tp_mamba.training.export import export_run
    from tp_mamba.training.metrics import plot_losses
    from tp_mamba.training.saver import steps_in
    from tp_mamba.training.setup import build_model
    from tp_mamba.training.trainer import Trainer

    run, world = Path(args.out), ranks.world
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    if args.compute_dtype is not None:
        dtype = getattr(torch, args.compute_dtype)
    with world.agreed():
        train, valid = read_data(args)
    model = build_model(
        ranks,
        config=None if args.checkpoint else model_config(args),
        checkpoint=_folder(args),
        seed=args.settings.seed,
        compute_dtype=dtype,
        checkpoint_level=args.checkpoint_level,
        sequence_parallel=args.sequence_parallel,
    )
    trainer = Trainer(
        model, args.settings, ranks, train, valid, run, compute_dtype=dtype, tensorboard=args.tensorboard
    )
    steps = world.broadcast_object(steps_in(run))
    if args.resume and steps:
        trainer.load(steps[-1])
    with step_bar(ranks.is_owner and not args.json) as progress:
        report: dict[str, Any] = {"run": str(run), **trainer.fit(progress)}
    report |= {"ranks": {"tp": ranks.tp.size, "dp": ranks.dp.size}}
    report |= {"dtype": str(dtype).removeprefix("torch.")}
    if args.plot and ranks.is_owner:
        report["plot"] = str(plot_losses(run))
    if args.export is not None and ranks.is_owner:
        report["exported"] = {"folder": args.export, **export_run(run, Path(args.export))}
    return report


def read_data(args: argparse.Namespace) -> tuple[Tokens, Tokens | None]:
    """Tokens to train on and tokens to validate on.

    Raises:
        ValueError: a file is missing, empty or damaged, or the tokenizer is not the model's.
    """
    from tp_mamba.training.setup import (
        Data,
        check_vocabulary,
        end_of_text_id,
        get_tokenizer,
        load_data,
    )

    name = _tokenizer_name(args)
    data = Data(
        files=tuple(map(Path, args.data)),
        valid_files=tuple(map(Path, args.valid)),
        valid_fraction=args.valid_fraction,
        tokenizer=name,
        text_field=args.text_field,
        **({"cache": Path(args.cache)} if args.cache else {}),
    )
    tokenizer, config = get_tokenizer(name), model_config(args)
    check_vocabulary(config, tokenizer)
    return load_data(data, tokenizer, end_of_text_id(config, _folder(args)))


def model_config(args: argparse.Namespace) -> MambaConfig:
    """The model's configuration: the checkpoint's, ``--config``'s, or that of the sizes given.

    Raises:
        ValueError: it is not that of a Mamba-1 model.
    """
    from tp_mamba.config import MambaConfig
    from tp_mamba.launch.training.arguments import config_of

    return MambaConfig.from_pretrained(args.checkpoint) if args.checkpoint else config_of(args)


def _check_model(args: argparse.Namespace) -> None:
    """Refuse what the ranks would refuse when they build their model."""
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.parallel.group import TensorParallel

    MambaForCausalLM(model_config(args), tp=TensorParallel.virtual(0, args.tp), device="meta")


def _refuse_run(args: argparse.Namespace) -> None:
    from tp_mamba.training.saver import steps_in

    steps = steps_in(Path(args.out))
    if steps and not args.resume:
        raise ValueError(
            f"{args.out} holds a training run already, up to step {steps[-1]}: pass --resume to go on with it, or name "
            "another folder with --out"
        )


def _folder(args: argparse.Namespace) -> Path | None:
    return None if args.checkpoint is None else Path(args.checkpoint)


def _tokenizer_name(args: argparse.Namespace) -> str:
    from tp_mamba.training.setup import BYTES

    return args.tokenizer or args.checkpoint or BYTES


def _tell(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    loss = report["best_valid_loss"]
    rows = [("run", f"{report['run']}, {report['steps']} steps")]
    if loss is not None:
        rows.append(("validation", f"{loss:.4f} nats per token, best at step {report['best_step']}"))
    if report["stopped_early"]:
        rows.append(("ended", "validation got no better"))
    if report["out_of_time"]:
        rows.append(("ended", "the time was up"))
    rows += [(name, str(report[name])) for name in ("plot",) if name in report]
    if "exported" in report:
        rows.append(("exported", f"{report['exported']['folder']}, step {report['exported']['step']}"))
    show(facts(rows))
