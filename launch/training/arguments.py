"""The arguments of ``tp-mamba train``. Nothing here imports torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import positive_int
from tp_mamba.launch.ranks.failures import UsageError
from tp_mamba.training.settings import TrainSettings

if TYPE_CHECKING:
    from tp_mamba.config import MambaConfig

_SIZES = (
    "hidden_size",
    "layers",
    "intermediate_size",
    "state_size",
    "conv_kernel",
    "time_step_rank",
    "vocab_size",
)


def add_run(group: argparse._ActionsContainer) -> None:
    """Where the run is kept."""
    group.add_argument(
        "--out", required=True, metavar="RUN", help="folder of the run: checkpoints and metrics"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in RUN, if there is one"
    )
    group.add_argument(
        "--export", metavar="OUT", help="at the end write the best model to OUT, as tp-mamba export does"
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="write events for TensorBoard into RUN/tensorboard"
    )
    group.add_argument("--plot", action="store_true", help="at the end draw the losses into RUN/losses.png")


def add_data(group: argparse._ActionsContainer) -> None:
    """What is read."""
    group.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="FILE",
        help="a text file, which is one document, or JSON lines (.jsonl), one document each; may be repeated",
    )
    group.add_argument(
        "--valid",
        action="append",
        default=[],
        metavar="FILE",
        help="the same for validation; may be repeated",
    )
    group.add_argument(
        "--valid-fraction",
        type=fraction,
        default=0.0,
        metavar="X",
        help="without --valid: this share of the tokens of --data, the last ones, is for validation (default 0: none)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="PATH_OR_NAME",
        help='where tokenizer.json is, or "bytes" (default: the checkpoint\'s; without a checkpoint, bytes)',
    )
    group.add_argument(
        "--text-field", default="text", metavar="KEY", help="key of a JSON line's text (default text)"
    )
    group.add_argument(
        "--cache", metavar="FOLDER", help="where token ids are kept (default ~/.cache/tp_mamba/tokens)"
    )


def add_model(group: argparse._ActionsContainer) -> None:
    """The sizes of a new model."""
    group.add_argument("--config", metavar="FILE", help="a config.json, in place of the sizes below")
    for name, text in (
        ("hidden_size", "H (default 256)"),
        ("layers", "number of layers (default 6)"),
        ("intermediate_size", "D, channels of a mixer (default 2 H)"),
        ("state_size", "N (default 16)"),
        ("conv_kernel", "K, 2 to 4 (default 4)"),
        ("time_step_rank", "R (default H / 16, rounded up)"),
        ("vocab_size", "V (default 256, or what the tokenizer needs, rounded up to 8)"),
    ):
        group.add_argument(f"--{name.replace('_', '-')}", type=positive_int, metavar="N", help=text)


def add_settings(group: argparse._ActionsContainer) -> None:
    """Everything in :class:`TrainSettings`, under its name there."""
    group.add_argument("--steps", type=int, required=True, metavar="N", help="updates of the parameters")
    for name, kind, text in (
        ("batch_size", int, "rows of a step, over all ranks"),
        ("sequence_length", int, "tokens of a row"),
        ("micro_batches", int, "parts that a step is computed in, to save memory"),
        ("lr", float, "largest learning rate"),
        ("min_lr", float, "learning rate at the end, after a cosine (default: lr / 10)"),
        ("warmup", int, "steps until the largest learning rate (default: a hundredth of --steps)"),
        ("weight_decay", float, "AdamW's, of matrices; A_log, D, biases and norms do not decay"),
        ("beta1", float, "AdamW's"),
        ("beta2", float, "AdamW's"),
        ("eps", float, "AdamW's"),
        ("clip", float, "largest norm of all gradients together"),
        ("seed", int, "of initial values and of the order of the data"),
        ("eval_every", int, "steps between validations; 0: only at the end"),
        ("valid_batches", int, "batches of a validation; 0: all"),
        ("save_every", int, "steps between checkpoints; 0: only at the end, and where validation is best"),
        ("keep", int, "checkpoints that are kept, beside the best"),
        ("log_every", int, "steps between records of the loss"),
        ("patience", int, "end after so many validations without a better one; 0: never"),
        (
            "max_seconds",
            float,
            "end after so much time, the learning rate falling in time for it; 0: at no time",
        ),
    ):
        default = TrainSettings.__dataclass_fields__[name].default
        shown = "" if default is None else f" (default {default:g})"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            metavar="N" if kind is int else "X",
            help=text + shown,
        )
    group.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        help="what is computed in; parameters and their updates stay float32 (default: bfloat16 on a GPU)",
    )
    group.add_argument(
        "--checkpoint-level",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="computed again to save memory: 0 nothing, 1 convolution and time steps, 2 whole layers (default 0)",
    )
    group.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="with --tp: share the tokens between layers too; same results",
    )


def fraction(text: str) -> float:
    """A number of at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least 0 and below 1")
    return value


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """What the arguments say.

    Raises:
        UsageError: values out of range, or that do not fit one another.
    """
    given: dict[str, Any] = {name: getattr(args, name) for name in TrainSettings.__dataclass_fields__}
    try:
        return TrainSettings(**given)
    except ValueError as error:
        raise UsageError(str(error)) from None


def config_of(args: argparse.Namespace) -> MambaConfig:
    """The configuration of a new model.

    Raises:
        ValueError: ``--config`` is no configuration, or the sizes are none.
    """
    from tp_mamba.config import MambaConfig
    from tp_mamba.text.tokenizer import end_of_ids
    from tp_mamba.training.setup import BYTES, get_tokenizer
    from tp_mamba.training.tokens import BYTE_VOCABULARY

    given = [name for name in _SIZES if getattr(args, name) is not None]
    if args.config is not None:
        if given:
            raise UsageError(
                f"--config and --{given[0].replace('_', '-')} are given: config.json says all the sizes"
            )
        try:
            return MambaConfig.from_dict(json.loads(Path(args.config).read_text(encoding="utf-8")))
        except (OSError, UnicodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"--config {args.config} cannot be read ({error}): name a config.json"
            ) from error
    vocabulary = args.vocab_size
    if vocabulary is None:
        tokenizer = get_tokenizer(args.tokenizer or BYTES)
        vocabulary = BYTE_VOCABULARY if tokenizer is None else -(-end_of_ids(tokenizer) // 8) * 8
    H = args.hidden_size or 256
    return MambaConfig.from_dict(
        {
            "model_type": "mamba",
            "hidden_size": H,
            "num_hidden_layers": args.layers or 6,
            "intermediate_size": args.intermediate_size or 2 * H,
            "state_size": args.state_size or 16,
            "conv_kernel": args.conv_kernel or 4,
            "time_step_rank": args.time_step_rank or -(-H // 16),
            "vocab_size": vocabulary,
        }
    )
