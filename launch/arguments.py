"""Argument types and groups shared by the verbs. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tp_mamba.engine.params import SamplingParams

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")

MOST_RANKS = 256
"""Ranks that one machine is asked to start; more are a slip of the pen, not a machine."""


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def rank_count(text: str) -> int | str:
    """A number of ranks to start, or ``auto``."""
    if text == "auto":
        return text
    if not _is_rank_count(text):
        raise argparse.ArgumentTypeError(
            f'got {text!r}, expected a number of ranks from 1 to {MOST_RANKS}, or "auto"'
        )
    return int(text)


def rank_counts(text: str) -> list[int]:
    """Numbers of ranks to start, divided by commas, ``1,2,4``; repeats are dropped."""
    parts = text.split(",")
    if not all(_is_rank_count(part.strip()) for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected numbers of ranks from 1 to {MOST_RANKS} divided by commas, as in 1,2,4"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def _is_rank_count(text: str) -> bool:
    return text.isdecimal() and 1 <= int(text) <= MOST_RANKS


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    value = _number(text, float)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1, as in 0.8")
    return value


def tolerance(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text, float)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number of at least 0")
    return value


def positive_seconds(text: str) -> float:
    """A finite number of seconds above 0."""
    value = _number(text, float)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of seconds above 0")
    return value


def port_number(text: str) -> int:
    """A TCP port; 0 for any that is free."""
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a port from 0 to {2**16 - 1}")
    return int(text)


def sampling(field: str, parse: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """The type of an argument that becomes ``field`` of SamplingParams, with the limits that it has there.

    A field that holds several values takes one per argument.
    """
    several = isinstance(SamplingParams.__dataclass_fields__[field].default, tuple)

    def convert(text: str) -> Any:
        value = _number(text, parse)
        try:
            given: dict[str, Any] = {field: (value,) if several else value}
            SamplingParams(**given)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return convert


def logit_bias(text: str) -> tuple[int, float]:
    """``ID=X``, one pair of SamplingParams' ``logit_bias``."""
    token, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an id and what is added, as in 11=-100")
    pair = (_number(token, int), _number(value, float))
    try:
        SamplingParams(logit_bias=(pair,))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return pair


def _number(text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError:
        kind = "a whole number" if parse is int else "a number"
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {kind}") from None


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of ``--dtype``; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The positional CHECKPOINT of the verbs that read a model."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a folder with config.json and weights, or a Hugging Face model name to download",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--debug``, which every verb has."""
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show stack traces (also TP_MAMBA_DEBUG=1)")


def add_device(parser: argparse._ActionsContainer) -> None:
    """``--device`` and ``--backend`` of the verbs that compute."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to compute (default: GPUs if there are enough)"
    )
    parser.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="how ranks communicate (default: nccl on GPUs, gloo on a CPU)",
    )
