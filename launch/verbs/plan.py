"""``tp-mamba plan``: what each rank would hold, keep and send, worked out without weights."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import DTYPES, add_checkpoint, positive_int, torch_dtype
from tp_mamba.launch.console import facts, human_bytes, print_json, show, table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.parallel.group import TensorParallel
    from tp_mamba.parallel.sharding import Shard

USES_RANKS = False
HELP = "show, without loading weights, what each rank would hold, keep for a sequence and send for a token"
EXAMPLES = """\
  tp-mamba plan ./mamba-2.8b-hf --tp 8
  tp-mamba plan ./mamba-2.8b-hf --tp 8 --all          every layer, not one line for those that are alike
  tp-mamba plan ./falcon-mamba-7b --tp 2 --dtype bfloat16 --json
"""

NOT_DECLARED = "not declared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_checkpoint(parser)
    parser.add_argument(
        "--tp",
        type=positive_int,
        default=1,
        metavar="N",
        help="tensor-parallel ranks (default 1); none is started",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--all", action="store_true", help="one line for every layer")


def prepare(args: argparse.Namespace) -> None:
    """Nothing to do before the work: no rank is started."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter, or the same parameter of ``count`` layers that are alike."""

    name: str
    full_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    split: str
    dtype: str
    local_bytes: int
    """Bytes on a rank of one such parameter, padding included."""
    padding_bytes: int
    """Bytes of padding of one such parameter, over all ranks."""
    count: int = 1


def rows_of(model: MambaForCausalLM, n: int) -> list[Row]:
    """One row for every parameter of a (meta) model of ``n`` ranks."""
    from tp_mamba.parallel.sharding import sharded_tensors

    rows = []
    for tensor in sharded_tensors(model):
        shard, dtype = tensor.shard, tensor.param.dtype
        local = shard.local_shape(n)
        size = dtype.itemsize
        full_bytes = math.prod(shard.shape) * size
        local_bytes = math.prod(local) * size
        rows.append(
            Row(
                tensor.name,
                shard.shape,
                local,
                _describe(shard),
                str(dtype).removeprefix("torch."),
                local_bytes,
                0 if shard.dim is None else n * local_bytes - full_bytes,
            )
        )
    return rows


def _describe(shard: Shard) -> str:
    if shard.dim is None:
        return "replicated"
    pieces = len(shard.pieces)
    return f"dim {shard.dim}" + (f", {pieces} parts" if pieces > 1 else "")


def collapse(rows: list[Row]) -> list[Row]:
    """Join the rows of layers that are alike: ``backbone.layers.{0..23}.norm.weight`` with a count of 24."""
    groups: dict[tuple[object, ...], list[tuple[int, Row]]] = {}
    for row in rows:
        match = re.search(r"(?<=\.layers\.)\d+(?=\.)", row.name)
        pattern = row.name if match is None else f"{row.name[: match.start()]}{{}}{row.name[match.end() :]}"
        key = (pattern, row.full_shape, row.local_shape, row.split, row.dtype)
        groups.setdefault(key, []).append((-1 if match is None else int(match.group()), row))
    joined = []
    for (shared_name, *_), members in groups.items():
        first, last, row = members[0][0], members[-1][0], members[0][1]
        layers = f"{{{first}..{last}}}" if len(members) > 1 else str(first)
        name = str(shared_name).replace("{}", layers)
        joined.append(
            Row(
                name,
                row.full_shape,
                row.local_shape,
                row.split,
                row.dtype,
                row.local_bytes,
                row.padding_bytes,
                len(members),
            )
        )
    return joined


def communication(model: MambaForCausalLM) -> dict[str, int]:
    """What one token costs each rank of a (meta) model in collectives: how many, and the bytes of their results.

    They are counted as the model asks for them, with nothing sent: see :func:`tp_mamba.parallel.communicate.counted`.
    """
    import torch

    from tp_mamba.batch import whole_sequences
    from tp_mamba.parallel.communicate import counted

    token = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), counted(model.tp) as traffic:
        model.lm_head(model.backbone(token, whole_sequences(1, 1, token.device), None))
    return dataclasses.asdict(traffic)


def state_bytes(model: MambaForCausalLM) -> int:
    """Bytes of recurrent state of one sequence on one rank: convolution and SSM state of every layer."""
    total = 0
    for mixer in model.mixers():
        for shape, dtype in zip(mixer.get_state_shape(), mixer.get_state_dtype(), strict=True):
            total += math.prod(shape) * dtype.itemsize
    return total


def planned_dtype(checkpoint: str, declared: torch.dtype | None) -> tuple[torch.dtype, str]:
    """The dtype that loading would give the weights, and where it was found.

    As loading does: what config.json declares, else what the files hold. Without weights nothing tells, and it
    is float32.

    Raises:
        CheckpointError: the files are damaged or hold no Mamba layer's weights.
    """
    import torch

    from tp_mamba.checkpoint.dtype import checkpoint_dtype
    from tp_mamba.checkpoint.files import BIN_PATTERNS, SAFETENSORS_PATTERNS
    from tp_mamba.checkpoint.location import resolve
    from tp_mamba.checkpoint.sources.open import open_source

    if declared is not None:
        return declared, "config.json"
    folder = resolve(checkpoint, config_only=True)
    if any(any(folder.glob(pattern)) for pattern in (*SAFETENSORS_PATTERNS, *BIN_PATTERNS)):
        return checkpoint_dtype(open_source(folder)), "weights"
    return torch.float32, NOT_DECLARED


def make_plan(checkpoint: str, n: int, dtype: str | None) -> tuple[list[Row], dict[str, Any]]:
    """The rows and the totals of ``checkpoint`` over ``n`` ranks."""
    from tp_mamba.config import MambaConfig
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.parallel.group import TensorParallel

    config = MambaConfig.from_pretrained(checkpoint)
    asked = torch_dtype(dtype)
    weights_dtype, origin = (asked, "--dtype") if asked else planned_dtype(checkpoint, config.dtype)
    # Shapes are the same on every rank, padding included: rank 0 stands for all.
    model = MambaForCausalLM(config, tp=TensorParallel.virtual(0, n), dtype=weights_dtype, device="meta")
    rows = rows_of(model, n)
    return rows, {
        "checkpoint": checkpoint,
        "ranks": n,
        "dtype": str(model.dtype).removeprefix("torch."),
        "dtype_from": origin,
        "parameters": sum(math.prod(row.full_shape) for row in rows),
        "bytes_per_rank": sum(row.local_bytes for row in rows),
        "padding_bytes": sum(row.padding_bytes for row in rows),
        "state_bytes_per_sequence": state_bytes(model),
        "activation_bytes_per_token": model.activation_bytes_per_token,
        "communication_per_token": communication(model),
    }


def run(args: argparse.Namespace, tp: TensorParallel | None) -> int:
    """Print the plan."""
    rows, totals = make_plan(args.checkpoint, args.tp, args.dtype)
    if args.json:
        keys = ("name", "full_shape", "local_shape", "split", "dtype", "local_bytes", "padding_bytes")
        print_json({**totals, "tensors": [{key: getattr(row, key) for key in keys} for row in rows]})
        return 0
    lines = [
        (
            row.name,
            list(row.full_shape),
            row.split,
            list(row.local_shape),
            row.dtype,
            row.count,
            human_bytes(row.count * row.local_bytes),
        )
        for row in (rows if args.all else collapse(rows))
    ]
    columns = ("parameter", "full shape", "split", "on each rank", "dtype", "count", "bytes per rank")
    title = f"{args.checkpoint} over {args.tp} rank{'s' * (args.tp > 1)}"
    show(title, "", table(columns, lines, left=5), "", _totals(totals), to_stdout=True)
    return 0


def _dtype_line(totals: dict[str, Any]) -> str:
    if totals["dtype_from"] == NOT_DECLARED:
        return f"{totals['dtype']} ({NOT_DECLARED}, and no weights here to tell: pass --dtype for another)"
    return f"{totals['dtype']} (from {totals['dtype_from']})"


def _totals(totals: dict[str, Any]) -> Table:
    traffic: dict[str, int] = totals["communication_per_token"]
    sent = (
        "none"
        if totals["ranks"] == 1
        else (
            f"{traffic['all_reduces']} all-reduces of {human_bytes(traffic['all_reduce_bytes'])} in all, "
            f"{traffic['all_gathers']} all-gather of {human_bytes(traffic['all_gather_bytes'])}"
        )
    )
    return facts(
        [
            ("parameters", f"{totals['parameters']:,}"),
            ("dtype", _dtype_line(totals)),
            ("weights per rank", human_bytes(totals["bytes_per_rank"])),
            ("padding, all ranks", human_bytes(totals["padding_bytes"])),
            ("state a sequence, a rank", human_bytes(totals["state_bytes_per_sequence"])),
            ("activations a token, a rank", human_bytes(totals["activation_bytes_per_token"])),
            ("communication a token", sent),
        ],
    )
