"""Residual add and RMSNorm in one pass; and dt, B and C cut out of x_proj's output and normed.

The residual is float32, everything else bfloat16. The limit is bytes: every input and output once. Calls run in one
CUDA graph, each on tensors of its own.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks import limits, runner
from benchmarks.case import Case, Workload
from benchmarks.chain import Chain, links
from benchmarks.checking import Error, compare
from benchmarks.inputs import normal
from benchmarks.timing import Samples, replayed
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.rms_norm.reference import add_rms_norm_reference
from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.kernels.split_dt_bc.reference import split_dt_bc_reference

HIDDEN, RANK, STATES = 4096, 256, 16
TOKENS = (1, 32, 256, 2048, 8192)
EPS = 1e-5


def build_add(generator: torch.Generator, *, tokens: int, hidden: int, copies: int | None = None) -> Workload:
    """``x [T, H]`` and residual, ``copies`` times, by default until memory is what counts."""
    copies = copies or links(add_bytes(tokens, hidden))
    inputs = [
        (
            normal(generator, tokens, hidden),
            normal(generator, tokens, hidden, std=3.0, dtype=torch.float32),
            normal(generator, hidden, mean=1.0, std=0.3),
        )
        for _ in range(copies)
    ]
    chain = Chain([partial(add_rms_norm, *each, EPS) for each in inputs], generator.device)

    def check() -> list[Error]:
        poison(chain)
        chain()
        errors = []
        for i in sorted({0, copies - 1}):
            x, residual, weight = (tensor.double() for tensor in inputs[i])
            exact = add_rms_norm_reference(x, residual, weight, EPS)
            for name, actual, wanted in zip(("normed", "residual"), chain.outputs[i], exact, strict=True):
                errors.append(compare(name, actual, wanted))
        return errors

    return Workload(check=check, measure=partial(_measure, chain))


def build_split(
    generator: torch.Generator, *, tokens: int, rank: int, states: int, copies: int | None = None
) -> Workload:
    """``x [T, R + 2N]`` in float32, as x_proj leaves it, with the weightless norms of FalconMamba."""
    copies = copies or links(split_bytes(tokens, rank, states))
    inputs = [normal(generator, tokens, rank + 2 * states, dtype=torch.float32) for _ in range(copies)]

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return split_dt_bc(x, rank, states, eps=1e-6, dt_dtype=torch.bfloat16)

    chain = Chain([partial(call, x) for x in inputs], generator.device)

    def check() -> list[Error]:
        poison(chain)
        chain()
        errors = []
        for i in sorted({0, copies - 1}):
            exact = split_dt_bc_reference(inputs[i].double(), rank, states, eps=1e-6, dt_dtype=torch.float64)
            for name, actual, wanted in zip(("dt", "B", "C"), chain.outputs[i], exact, strict=True):
                errors.append(compare(name, actual, wanted))
        return errors

    return Workload(check=check, measure=partial(_measure, chain))


def poison(chain: Chain) -> None:
    """NaN in every output that the next run is to write."""
    for output in chain.outputs:
        for tensor in output:
            tensor.fill_(float("nan"))


def _measure(chain: Chain, samples: int) -> Samples:
    return replayed(chain, samples).scaled(1 / len(chain))


def add_bytes(tokens: int, hidden: int) -> int:
    """Input and output in bfloat16, both residuals in float32, and the weight."""
    return 12 * tokens * hidden + 2 * hidden


def split_bytes(tokens: int, rank: int, states: int) -> int:
    """Input in float32, dt in bfloat16, B and C in float32."""
    return tokens * (4 * (rank + 2 * states) + 2 * rank + 8 * states)


def _case(kind: str, tokens: int) -> Case:
    if kind == "add":
        name, moved = f"add and norm, T {tokens}, H {HIDDEN}", add_bytes(tokens, HIDDEN)
        build = partial(build_add, tokens=tokens, hidden=HIDDEN)
    else:
        name, moved = f"split and norms, T {tokens}, R {RANK}, N {STATES}", split_bytes(tokens, RANK, STATES)
        build = partial(build_split, tokens=tokens, rank=RANK, states=STATES)
    return Case(
        name=name,
        unit="us",
        sizes={"tokens": tokens, "form": kind},
        build=build,
        limit=limits.by_bytes(moved),
        work=(moved, "bytes"),
    )


CASES = [_case(kind, tokens) for kind in ("add", "split") for tokens in TOKENS]


if __name__ == "__main__":
    sys.exit(runner.main("norm", __doc__, CASES))
