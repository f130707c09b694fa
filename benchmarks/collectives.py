"""Sums over two GPUs and the norm or split behind them: our kernels, NCCL, and torch's on symmetric memory.

torchrun --nproc-per-node 2 -m benchmarks.collectives. Falcon-mamba-7b's messages: out_proj's sum in bfloat16 with a
float32 residual, and x_proj's in float32. Calls run in one CUDA graph; each form's outputs are compared with float64
first, and the time is the slowest rank's. The limit is the link, at the 370 GB/s that a read was measured at.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch

from benchmarks import inputs, runner
from benchmarks.case import Case, Workload
from benchmarks.chain import Chain
from benchmarks.checking import Error, compare
from benchmarks.peers import Target
from benchmarks.timing import Samples
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.rms_norm.reference import add_rms_norm_reference
from tp_mamba.kernels.split_dt_bc.reference import split_dt_bc_reference
from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial

HIDDEN, RANK, STATES, EPS = 4096, 256, 16, 1e-5
LINK = 370e9
"""Bytes a second, one way."""
MUST = {1: Target(must=5, stretch=3), 32: Target(must=6.5, stretch=4.5), 256: Target(must=16, stretch=12)}
NO_NORMS = {"dt_weight": None, "b_weight": None, "c_weight": None}


@functools.lru_cache(maxsize=1)
def ranks() -> TensorParallel:
    return TensorParallel.from_env()


def _torch_sum(op: str, x: torch.Tensor, tp: TensorParallel) -> Callable[[], torch.Tensor]:
    """One of torch's own sums, of a copy of ``x`` in symmetric memory; in place, so ``x`` is copied anew."""
    import torch.distributed._symmetric_memory as symmetric_memory

    held = symmetric_memory.empty(x.shape, dtype=x.dtype, device=x.device)
    symmetric_memory.rendezvous(held, tp.process_group())
    held.copy_(x)
    call = getattr(torch.ops.symm_mem, op)
    return lambda: call(held, "sum", tp.process_group().group_name)


def build(
    generator: torch.Generator,
    *,
    rows: int,
    form: str,
    hidden: int = HIDDEN,
    rank: int = RANK,
    calls: int = 20,
) -> Workload:
    """``form``: ``ours`` or ``NCCL``, with the norm or (``split``) the split; ``one-shot``: torch's, with the norm."""
    tp = ranks() if generator.device.type == "cuda" else TensorParallel(device=generator.device)
    plain = TensorParallel(tp.group, device=tp.device, communicator=Communicator())
    who = plain if form.startswith("NCCL") else tp
    if form.endswith("split"):
        terms = [
            inputs.normal(generator, rows, rank + 2 * STATES, dtype=torch.float32) for _ in range(tp.size)
        ]
    else:
        terms = [inputs.normal(generator, rows, hidden) for _ in range(tp.size)]
        residual = inputs.normal(generator, rows, hidden, std=3.0, dtype=torch.float32)
        weight = inputs.normal(generator, hidden, mean=1.0, std=0.3)
    own = terms[tp.rank]

    def split() -> tuple[torch.Tensor, ...]:
        # Sums may be in place: a call is timed with the copy that keeps its input.
        return Partial(own.clone(), who).split(rank, STATES, **NO_NORMS, eps=EPS, dt_dtype=torch.bfloat16)

    def norm() -> tuple[torch.Tensor, ...]:
        x = own.clone() if who is plain else own
        return Partial(x, who).add_and_norm(residual, weight, EPS, residual_in_fp32=True)  # type: ignore[return-value]

    call: Callable[[], tuple[torch.Tensor, ...]] = split if form.endswith("split") else norm
    if form == "one-shot":
        add = _torch_sum("one_shot_all_reduce", own, tp)

        def torch_sum() -> tuple[torch.Tensor, ...]:
            return add_rms_norm(add(), residual, weight, EPS)

        call = torch_sum

    chain = Chain([call] * calls, generator.device)

    def check() -> list[Error]:
        chain()
        total = torch.stack([term.double() for term in terms]).sum(dim=0)
        if form.endswith("split"):
            exact = split_dt_bc_reference(total, rank, STATES, eps=EPS, dt_dtype=torch.float64)
            rounded: tuple[torch.Tensor, ...] = exact
        else:
            exact = add_rms_norm_reference(total, residual.double(), weight.double(), EPS)
            rounded = add_rms_norm_reference(total.to(own.dtype), residual, weight, EPS)
        names = ("dt", "B", "C") if form.endswith("split") else ("normed", "residual")
        found = zip(names, chain.outputs[-1], exact, rounded, strict=True)
        return [
            compare(name, actual, right, rounded=None if right is near else near)
            for name, actual, right, near in found
        ]

    def measure(samples: int) -> Samples:
        """As many replays on every rank, whatever its clock says."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        for _ in range(20):
            chain()
        for event in events:
            chain()
            event.record()
        torch.cuda.synchronize()
        taken = [a.elapsed_time(b) / 1e3 / calls for a, b in pairwise(events)]
        every = tp.all_gather_object(taken)
        return Samples(max(every, key=statistics.median))

    return Workload(check=check, measure=measure)


def _case(rows: int, form: str) -> Case:
    width = 4 * (RANK + 2 * STATES) if form.endswith("split") else 2 * HIDDEN
    return Case(
        name=f"{rows} rows, {form}",
        unit="us",
        sizes={"tokens": rows, "form": form},
        build=partial(build, rows=rows, form=form),
        limit=lambda gpu: rows * width / LINK,
        target=MUST.get(rows, Target()) if form == "ours" else Target(),
        work=(rows * width, "bytes"),
    )


CASES = [
    _case(rows, form) for rows in (1, 8, 32, 128, 256, 2048, 8192) for form in ("ours", "NCCL", "one-shot")
]
CASES += [_case(rows, form) for rows in (1, 32, 128, 2048, 8192) for form in ("ours, split", "NCCL, split")]


def main(argv: Sequence[str] | None = None) -> int:
    """As :func:`benchmarks.runner.main`, on every rank that torchrun started; rank 0 tells."""
    options = runner.parser("collectives", __doc__, CASES, 40).parse_args(argv)
    if not runner.has_gpu("collectives"):
        return 2
    tp = ranks()
    options.seed = tp.broadcast_object(secrets.randbelow(2**31) if options.seed is None else options.seed)
    with contextlib.ExitStack() as quiet:
        if tp.rank > 0:
            options.json = None
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        return runner.run("collectives", CASES, options, tp.device)


if __name__ == "__main__":
    sys.exit(main())
