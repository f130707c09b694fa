"""Projections: dt_proj with its softplus, and the products of few rows that decode is made of.

Decode's products run over every weight of falcon-mamba-7b, as torch (cuBLAS) computes them and, where a kernel of
ours can stand beside it, by that ("ours"): "of limit" is the share of the read bandwidth. x_proj's leaves in float32,
as in the mixer. Calls run in one CUDA graph, each with a weight of its own, so that weights come from memory. The
limit is bytes or operations, whichever takes longer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import limits, runner
from benchmarks.case import Case, Workload
from benchmarks.chain import Chain, links
from benchmarks.checking import Error, compare
from benchmarks.inputs import normal, time_step_bias
from benchmarks.peers import GEMM, WEIGHTS, Target
from benchmarks.timing import Samples, replayed
from tp_mamba.kernels.linear import skinny_linear
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.linear_softplus.reference import linear_softplus_reference

BATCHES = (1, 8, 32, 64)
TIME_STEPS = [(tokens, channels, 256) for channels in (8192, 4096) for tokens in (1, 32, 64, 256, 2048, 8192)]
OURS = ("in_proj", "x_proj", "out_proj")
"""Where our product for few rows is measured: dt_proj has a kernel with its softplus, lm_head is at its limit."""
CUBLAS_ROUNDS = 4.0
"""How many roundings of bfloat16 cuBLAS may make: a product split along K may add its parts up in bfloat16."""


def build_linear_softplus(
    generator: torch.Generator, *, tokens: int, channels: int, rank: int, copies: int | None = None
) -> Workload:
    """``softplus(x @ weight.T + bias)``, ``copies`` times, by default until memory is what counts."""
    copies = copies or links(_bytes(tokens, channels, rank))
    inputs = [
        (
            normal(generator, tokens, rank),
            normal(generator, channels, rank, std=1.2 * rank**-0.5),
            time_step_bias(generator, channels),
        )
        for _ in range(copies)
    ]

    def exact(i: int) -> torch.Tensor:
        return linear_softplus_reference(*(t.double() for t in inputs[i]))

    return _workload([partial(linear_softplus, *each) for each in inputs], exact, generator.device)


def build_product(
    generator: torch.Generator,
    *,
    batch: int,
    rows: int,
    columns: int,
    wide: bool,
    ours: bool = False,
    copies: int | None = None,
) -> Workload:
    """``x @ weight.T`` for ``weight [rows, columns]``, into float32 if ``wide``, by cuBLAS or by our kernel."""
    copies = copies or links(_bytes(batch, rows, columns))
    inputs = [
        (normal(generator, batch, columns), normal(generator, rows, columns, std=columns**-0.5))
        for _ in range(copies)
    ]

    def exact(i: int) -> torch.Tensor:
        x, weight = inputs[i]
        return F.linear(x.double(), weight.double())

    if ours:
        product = partial(skinny_linear, out_dtype=torch.float32 if wide else None)
        return _workload([partial(product, *each) for each in inputs], exact, generator.device)
    calls = [partial(_wide_product if wide else _product, *each) for each in inputs]
    return _workload(calls, exact, generator.device, rounds=CUBLAS_ROUNDS)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:  # mm's out_dtype serves GPUs alone
        return F.linear(x.float(), weight.float())
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _workload(
    calls: Sequence[Callable[[], torch.Tensor]],
    exact: Callable[[int], torch.Tensor],
    device: torch.device,
    rounds: float = 2.0,
) -> Workload:
    chain = Chain(calls, device)

    def check() -> list[Error]:
        for output in chain.outputs:
            output.fill_(float("nan"))
        chain()
        last = len(calls) - 1
        return [compare("out", chain.outputs[i], exact(i), rounds=rounds) for i in sorted({0, last})]

    def measure(samples: int) -> Samples:
        return replayed(chain, samples).scaled(1 / len(calls))

    return Workload(check=check, measure=measure)


def _bytes(batch: int, rows: int, columns: int, out_bytes: int = 2) -> int:
    return 2 * batch * columns + 2 * rows * columns + out_bytes * batch * rows


def _limit(batch: int, rows: int, columns: int, moved: int) -> limits.Limit:
    return limits.side_by_side(limits.by_bytes(moved), limits.by_flops(2 * batch * rows * columns))


def _time_steps_case(tokens: int, channels: int, rank: int) -> Case:
    moved = _bytes(tokens, channels, rank)
    return Case(
        name=f"dt_proj and softplus, T {tokens}, D {channels}, R {rank}",
        unit="us",
        sizes={"tokens": tokens, "D": channels, "form": "linear_softplus"},
        build=partial(build_linear_softplus, tokens=tokens, channels=channels, rank=rank),
        limit=_limit(tokens, channels, rank, moved),
        target=GEMM.get(("dt_proj" if channels == 8192 else "dt_proj, two ranks", tokens), Target()),
        work=(moved, "bytes"),
    )


def _product_case(weight: str, batch: int, by: str) -> Case:
    rows, columns = WEIGHTS[weight]
    wide = weight.startswith("x_proj")
    moved = _bytes(batch, rows, columns, 4 if wide else 2)
    return Case(
        name=f"{weight} {rows} x {columns}, batch {batch}, {by}",
        unit="us",
        sizes={"rows": batch, "form": weight, "by": by},
        build=partial(build_product, batch=batch, rows=rows, columns=columns, wide=wide, ours=by == "ours"),
        limit=_limit(batch, rows, columns, moved),
        target=GEMM.get((weight, batch), Target()),
        work=(moved, "bytes"),
    )


CASES = [_time_steps_case(*sizes) for sizes in TIME_STEPS] + [
    _product_case(weight, batch, by)
    for weight in WEIGHTS
    for batch in BATCHES
    for by in ("cuBLAS", *(["ours"] if weight.startswith(OURS) else []))
]


if __name__ == "__main__":
    sys.exit(runner.main("gemm", __doc__, CASES))
