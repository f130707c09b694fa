"""``tp-mamba info``: what a checkpoint is, and whether all of it is there. Reads config and headers only."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import add_checkpoint
from tp_mamba.launch.cli import verb_main
from tp_mamba.launch.console import facts, human_bytes, print_json, show
from tp_mamba.launch.published import PUBLISHED, Sizes

if TYPE_CHECKING:
    from tp_mamba.checkpoint.source import TensorSource
    from tp_mamba.config import MambaConfig
    from tp_mamba.tensor_parallel import TensorParallel

USES_RANKS = False
HELP = "show what a checkpoint is: family, sizes, dtype, files, and whether every tensor is there"
EXAMPLES = """\
  tp-mamba info ./mamba-130m-hf
  tp-mamba info ./mamba-2.8b-tp4 --json               a folder written by `tp-mamba shard`
"""

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
    """Print what was found; 1 if the checkpoint is not whole."""
    report = inspect_checkpoint(Path(args.checkpoint))
    if args.json:
        print_json(report)
    else:
        show(str(report["checkpoint"]), facts(_lines(report)), to_stdout=True)
    return 0 if report["complete"] else 1


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Everything ``tp-mamba info`` says, from config.json and the headers of the files in ``folder``."""
    from tp_mamba.checkpoint.source import open_source
    from tp_mamba.config import MambaConfig

    config = MambaConfig.from_pretrained(folder)
    source = open_source(folder)
    expected, found = expected_shapes(config), stored_shapes(config, source)
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    sizes = Sizes(*(getattr(config, name) for name in Sizes._fields))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    dtypes = Counter(str(source.dtype(name)).removeprefix("torch.") for name in source.names())
    return {
        "checkpoint": str(folder),
        "family": config.model_type,
        "layout": _layout(folder),
        "sizes": sizes._asdict(),
        "tied": config.tie_word_embeddings,
        "parameters": sum(math.prod(shape) for shape in expected.values()),
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "stored_dtypes": dict(dtypes),
        "files": {path.name: path.stat().st_size for path in files},
        "complete": not (missing or unknown or misshapen),
        "missing": missing,
        "unknown": unknown,
        "misshapen": misshapen,
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "published_sizes": PUBLISHED.get(sizes),
    }


def expected_shapes(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Name to full shape of every tensor a model of ``config`` is made of, by a model without memory."""
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.sharding import sharded_parameters

    model = MambaForCausalLM(config, device="meta")
    return {name: param.sharded.split.shape for name, param in sharded_parameters(model)}  # type: ignore[attr-defined]


def stored_shapes(config: MambaConfig, source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Name to shape of what the files hold; a tied head that is stored as well is left out."""
    from tp_mamba.checkpoint.names import LM_HEAD, canonical_name

    shapes = {canonical_name(name): tuple(source.shape(name)) for name in source.names()}
    if config.tie_word_embeddings:
        shapes.pop(LM_HEAD, None)
    return shapes


def _layout(folder: Path) -> str:
    from tp_mamba.checkpoint.files import BIN, MANIFEST

    if (folder / MANIFEST).is_file():
        return "one file a rank, by tp-mamba shard"
    return (
        "pickled .bin"
        if list(folder.glob(f"{BIN}*")) and not list(folder.glob("*.safetensors"))
        else "safetensors"
    )


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
        ("whole", "yes, every tensor is there" if report["complete"] else "NO"),
    ]
    for kind in ("missing", "unknown", "misshapen"):
        if found := report[kind]:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            lines.append((kind, ", ".join(found[:SHOWN]) + more))
    return lines


if __name__ == "__main__":
    sys.exit(verb_main("info"))
