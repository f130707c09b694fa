"""``tp-mamba info``: what a checkpoint is, and whether it would load.

Reads config.json and headers; weights only where a tied head is stored twice, which loading compares as well.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import add_checkpoint
from tp_mamba.launch.console import facts, human_bytes, print_json, show
from tp_mamba.launch.published import PUBLISHED, Sizes

if TYPE_CHECKING:
    from tp_mamba.checkpoint.matching import Comparison
    from tp_mamba.checkpoint.sources.open import TensorSource
    from tp_mamba.config import MambaConfig
    from tp_mamba.parallel.group import TensorParallel
    from tp_mamba.parallel.sharding import ShardedTensor

USES_RANKS = False
HELP = "show what a checkpoint is: family, sizes, dtype, files, and whether every tensor is there"
EXAMPLES = """\
  tp-mamba info ./mamba-130m-hf
  tp-mamba info ./mamba-2.8b-tp4 --json               a folder written by `tp-mamba shard`
"""

DIFFERENCES = ("duplicate", "missing", "unknown", "misshapen", "wrong_dtype")
"""Lists of a :class:`~tp_mamba.checkpoint.matching.Comparison`, in the order in which loading looks at them."""

SHOWN = 5
"""How many tensor names a line lists before it only counts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_checkpoint(parser)


def prepare(args: argparse.Namespace) -> None:
    """Find the checkpoint; a model name is downloaded."""
    from tp_mamba.checkpoint.location import resolve

    args.checkpoint = str(resolve(args.checkpoint))


def run(args: argparse.Namespace, tp: TensorParallel | None) -> int:
    """Print what was found; 1 if the checkpoint would not load."""
    report = inspect_checkpoint(Path(args.checkpoint))
    if args.json:
        print_json(report)
    else:
        show(str(report["checkpoint"]), facts(_lines(report)), to_stdout=True)
    return 0 if report["complete"] else 1


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Everything ``tp-mamba info`` says of the checkpoint in ``folder``."""
    from tp_mamba.checkpoint.matching import compare
    from tp_mamba.checkpoint.sources.candidates import find_weights
    from tp_mamba.checkpoint.sources.open import open_source
    from tp_mamba.config import MambaConfig
    from tp_mamba.models.registry import get_family

    config = MambaConfig.from_pretrained(folder)
    source = open_source(folder)
    expected = expected_tensors(config)
    comparison = compare(expected, source, get_family(config.model_type))
    refusal = comparison.refusal or _tied_refusal(source, comparison)
    sizes = Sizes(*(getattr(config, name) for name in Sizes._fields))
    weights = find_weights(folder)
    dtypes = Counter(str(source.dtype(name)).removeprefix("torch.") for name in source.names())
    return {
        "checkpoint": str(folder),
        "family": config.model_type,
        "layout": weights.layout.value,
        "sizes": sizes._asdict(),
        "tied": config.tie_word_embeddings,
        "parameters": sum(math.prod(tensor.shard.shape) for tensor in expected),
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "stored_dtypes": dict(dtypes),
        "files": {path.name: path.stat().st_size for path in sorted(weights.files)},
        "complete": refusal is None,
        "refusal": refusal,
        **{kind: getattr(comparison, kind) for kind in DIFFERENCES},
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "published_sizes": PUBLISHED.get(sizes),
    }


def expected_tensors(config: MambaConfig) -> list[ShardedTensor]:
    """Every tensor that a model of ``config`` is made of, by a model without memory."""
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.parallel.sharding import sharded_tensors

    return list(sharded_tensors(MambaForCausalLM(config, device="meta")))


def _tied_refusal(source: TensorSource, comparison: Comparison) -> str | None:
    """Why loading refuses the stored copy of a tied head, if it does."""
    from tp_mamba.checkpoint.errors import CheckpointError
    from tp_mamba.checkpoint.matching import verify_tied

    try:
        verify_tied(source, comparison.matching, 0, 1)
    except CheckpointError as error:
        return str(error)
    return None


def _lines(report: dict[str, Any]) -> list[tuple[str, object]]:
    sizes: dict[str, int] = report["sizes"]
    files: dict[str, int] = report["files"]
    stored = ", ".join(f"{count} tensors {name}" for name, count in report["stored_dtypes"].items())
    names = ", ".join(files) if len(files) <= SHOWN else f"{len(files)} files"
    lines: list[tuple[str, object]] = [
        ("family", f"{report['family']}, {report['layout']}"),
        ("sizes", ", ".join(f"{name} {size}" for name, size in sizes.items())),
        ("like", report["published_sizes"] or "no published model"),
        (
            "parameters",
            f"{report['parameters']:,}, head {'tied to the embedding' if report['tied'] else 'of its own'}",
        ),
        ("dtype", f"{report['dtype'] or 'not declared'} in config.json; {stored}"),
        ("files", f"{names}, {human_bytes(sum(files.values()))}"),
        ("tokenizer", "tokenizer.json" if report["tokenizer"] else "none here: pass --tokenizer to generate"),
        ("whole", "yes, every tensor is there" if report["complete"] else f"NO: {report['refusal']}"),
    ]
    for kind in DIFFERENCES:
        if found := [" = ".join(name) if kind == "duplicate" else name for name in report[kind]]:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            lines.append((kind.replace("_", " "), ", ".join(found[:SHOWN]) + more))
    return lines
