"""Sums over two GPUs with the norm or the split behind them: ours, NCCL's, and torch's on symmetric memory.

torchrun --nproc-per-node 2 -m benchmarks.collectives. The messages are falcon-mamba-7b's: out_proj's sum in bfloat16
with a float32 residual, and x_proj's in float32. Calls run in one CUDA graph, each on tensors of its own. Outputs are
compared with float64 first. Times are taken on zeros, which sums in place leave as they are, and are those of the
slower rank. The limit is the link, 370 GB/s one way, or the bytes of residual and norm where they take longer; the
latency of a few rows is not in it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch

from benchmarks import inputs, limits, over_ranks, runner
from benchmarks.case import Case, Workload
from benchmarks.chain import Chain
from benchmarks.checking import Error, compare
from benchmarks.over_ranks import ranks
from benchmarks.peers import COLLECTIVES, Target
from benchmarks.timing import Samples
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.rms_norm.reference import add_rms_norm_reference
from tp_mamba.kernels.split_dt_bc.reference import split_dt_bc_reference
from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial

HIDDEN, RANK, STATES, EPS = 4096, 256, 16, 1e-5
LINK = 370e9
"""Bytes a second that a GPU reads of another, while that reads as much of it."""

Outputs = tuple[torch.Tensor, ...]


def calls_of(rows: int) -> int:
    """As many in one graph as hide the gap between two replays."""
    return 20 if rows <= 256 else 4


def build(
    generator: torch.Generator, *, rows: int, form: str, hidden: int = HIDDEN, rank: int = RANK
) -> Workload:
    """A sum of ``rows`` rows.

    ``form`` is ``ours`` or ``NCCL``, with the norm or, ``ours, split``, with the split; or ``one-shot`` or
    ``two-shot``, torch's sums with our norm behind them.
    """
    on_gpu = generator.device.type == "cuda"
    tp = ranks() if on_gpu else TensorParallel(device=generator.device)
    splits = form.endswith("split")
    width, dtype = (rank + 2 * STATES, torch.float32) if splits else (hidden, torch.bfloat16)
    terms = [inputs.normal(generator, rows, width, dtype=dtype) for _ in range(tp.size)]
    residual = inputs.normal(generator, rows, hidden, std=3.0, dtype=torch.float32)
    weight = inputs.normal(generator, hidden, mean=1.0, std=0.3)
    make = torch.empty if "shot" not in form else partial(_shared, tp)
    own = [
        make(terms[0].shape, dtype=dtype, device=generator.device)
        for _ in range(calls_of(rows) if on_gpu else 1)
    ]
    for x in own:
        x.zero_()
    who = (
        tp
        if form.startswith("ours")
        else TensorParallel(tp.group, device=tp.device, communicator=Communicator())
    )

    def split(x: torch.Tensor) -> Outputs:
        return Partial(x, who).split(
            rank, STATES, dt_weight=None, b_weight=None, c_weight=None, eps=EPS, dt_dtype=torch.bfloat16
        )

    def norm(x: torch.Tensor) -> Outputs:
        normed, total = Partial(x, who).add_and_norm(residual, weight, EPS, residual_in_fp32=True)
        assert isinstance(normed, torch.Tensor)  # no communicator here leaves rows scattered
        return normed, total

    def torchs(x: torch.Tensor) -> Outputs:
        group = tp.process_group().group_name
        total = (
            torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group)
            if form == "one-shot"
            else torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", group)
        )
        return add_rms_norm(total, residual, weight, EPS)

    call: Callable[[torch.Tensor], Outputs] = split if splits else torchs if "shot" in form else norm
    chain = Chain([partial(call, x) for x in own], generator.device)

    def check() -> list[Error]:
        for x in own:
            x.copy_(terms[tp.rank])
        chain()
        total = torch.stack([term.double() for term in terms]).sum(dim=0)
        summed = total.to(dtype)
        exact: Outputs
        rounded: Outputs
        names: tuple[str, ...]
        if splits:
            names = ("dt", "B", "C")
            exact = split_dt_bc_reference(total, rank, STATES, eps=EPS, dt_dtype=torch.float64)
            rounded = split_dt_bc_reference(summed, rank, STATES, eps=EPS, dt_dtype=torch.bfloat16)
        else:
            names = ("normed", "residual")
            exact = add_rms_norm_reference(total, residual.double(), weight.double(), EPS)
            rounded = add_rms_norm_reference(summed, residual, weight, EPS)
        mine = [
            compare(name, actual, right, rounded=near)
            for outputs in (chain.outputs[0], chain.outputs[-1])
            for name, actual, right, near in zip(names, outputs, exact, rounded, strict=True)
        ]
        return [error for errors in tp.all_gather_object(mine) for error in errors]

    def measure(samples: int) -> Samples:
        for x in own:
            x.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        for _ in range(max(20, 400 // rows)):
            chain()
        for event in events:
            chain()
            event.record()
        torch.cuda.synchronize()
        taken = [a.elapsed_time(b) * 1e-3 / len(chain) for a, b in pairwise(events)]
        return Samples(tuple(max(tp.all_gather_object(taken), key=statistics.median)))

    return Workload(check=check, measure=measure)


def _shared(
    tp: TensorParallel, shape: torch.Size, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory that the other ranks see, for torch's own sums."""
    import torch.distributed._symmetric_memory as symmetric_memory

    held = symmetric_memory.empty(shape, dtype=dtype, device=device)
    symmetric_memory.rendezvous(held, tp.process_group())
    return held


def _case(rows: int, form: str) -> Case:
    splits = form.endswith("split")
    sent = rows * (4 * (RANK + 2 * STATES) if splits else 2 * HIDDEN)
    # Besides the message: residual in and out in float32, and the norm; or dt, B and C.
    moved = sent + rows * (2 * RANK + 8 * STATES if splits else 10 * HIDDEN)
    return Case(
        name=f"{rows} rows, {form}",
        unit="us",
        sizes={"rows": rows, "form": form},
        build=partial(build, rows=rows, form=form),
        limit=limits.side_by_side(limits.by_bytes(moved), lambda gpu: sent / LINK),
        target=COLLECTIVES.get(rows, Target()) if form == "ours" else Target(),
        work=(sent, "bytes"),
    )


CASES = [
    _case(rows, form)
    for rows in (1, 8, 32, 128, 256, 2048, 8192)
    for form in ("ours", "NCCL", "one-shot" if rows <= 128 else "two-shot")
] + [_case(rows, f"{whose}, split") for rows in (1, 32, 256, 2048) for whose in ("ours", "NCCL")]


def main(argv: Sequence[str] | None = None) -> int:
    """As :func:`benchmarks.runner.main`, on every rank that torchrun started; rank 0 tells."""
    options = runner.parser("collectives", __doc__, CASES, 40).parse_args(argv)
    if not runner.has_gpu("collectives"):
        return 2
    if ranks().size < 2:
        print(
            "python -m benchmarks.collectives was started as one rank, and sums over several: start it with "
            "torchrun --nproc-per-node 2 -m benchmarks.collectives",
            file=sys.stderr,
        )
        return 2
    return over_ranks.run("collectives", CASES, options)


if __name__ == "__main__":
    sys.exit(main())
