"""Argument types and groups shared by the verbs. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def rank_count(text: str) -> int | str:
    """A number of ranks, or ``auto``."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'got {text!r}, expected a number of ranks of at least 1, or "auto"')
    return int(text)


def rank_counts(text: str) -> list[int]:
    """Numbers of ranks divided by commas, ``1,2,4``; repeats are dropped."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected numbers of ranks divided by commas, as in 1,2,4"
        )
    return list(dict.fromkeys(int(part) for part in parts))


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
