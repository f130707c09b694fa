"""Causal convolution with bias and SiLU: whole sequences, and the one-step update of decode.

The input is a half of in_proj's output, read where it lies, and states go to slots, as in the mixer. The limit is
bytes: input and output once, and an update's states read and written. The L2 is emptied before every sample of the
forward pass; updates run in one CUDA graph, each on tensors of its own, so that states come from memory.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks import limits, runner
from benchmarks.case import Case, Workload
from benchmarks.ceilings import H200
from benchmarks.chain import Chain, links
from benchmarks.checking import Error, compare
from benchmarks.inputs import normal, starts
from benchmarks.peers import BYTE_MUST, Target
from benchmarks.timing import Samples, flushed, replayed
from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.causal_conv1d.reference import (
    causal_conv1d_reference,
    causal_conv1d_update_reference,
)

TAPS = 4
FORWARD = [(1, 2048, 8192), (1, 8192, 8192), (16, 512, 8192), (1, 8192, 4096), (1, 32768, 4096)]
UPDATE = [(batch, channels) for channels in (8192, 4096) for batch in (1, 32, 128, 256)]


def build_forward(generator: torch.Generator, *, sequences: int, length: int, channels: int) -> Workload:
    """``sequences`` times ``length`` packed tokens."""
    device = generator.device
    x_TD = normal(generator, sequences * length, 2 * channels)[:, :channels]
    weight = normal(generator, channels, TAPS, std=0.5)
    bias = normal(generator, channels, std=0.3)
    loc = starts(sequences, length, device)
    slots = torch.randperm(sequences, generator=generator, device=device).int()
    fresh = torch.zeros(sequences, dtype=torch.bool, device=device)
    states = x_TD.new_empty(sequences, TAPS - 1, channels).mT
    out_TD = x_TD.new_empty(x_TD.shape)

    def run() -> None:
        causal_conv1d_fn(
            x_TD.t(),
            weight,
            bias,
            activation="silu",
            query_start_loc=loc,
            cache_indices=slots,
            has_initial_state=fresh,
            conv_states=states,
            out=out_TD.t(),
        )

    def check() -> list[Error]:
        out_TD.fill_(float("nan"))
        states.fill_(float("nan"))
        run()
        exact_states = torch.zeros_like(states, dtype=torch.float64)
        exact = causal_conv1d_reference(
            x_TD.t().double(),
            weight.double(),
            bias.double(),
            "silu",
            query_start_loc=loc,
            cache_indices=slots,
            conv_states=exact_states,
        )
        return [compare("out", out_TD.t(), exact), compare("state", states, exact_states)]

    return Workload(check=check, measure=partial(flushed, run))


def build_update(
    generator: torch.Generator, *, batch: int, channels: int, copies: int | None = None
) -> Workload:
    """One token of each of ``batch`` sequences, ``copies`` times, by default until memory is what counts."""
    device = generator.device
    copies = copies or links(update_bytes(batch, channels))
    slots = torch.randperm(batch, generator=generator, device=device).int()
    inputs = [
        (
            normal(generator, batch, 2 * channels)[:, :channels],
            normal(generator, batch, TAPS - 1, channels).mT,
            normal(generator, channels, TAPS, std=0.5),
            normal(generator, channels, std=0.3),
        )
        for _ in range(copies)
    ]

    def call(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return causal_conv1d_update(x, state, weight, bias, "silu", conv_state_indices=slots)

    chain = Chain([partial(call, *each) for each in inputs], device)

    def check() -> list[Error]:
        checked = sorted({0, copies - 1})
        before = {i: inputs[i][1].double() for i in checked}
        for out in chain.outputs:
            out.fill_(float("nan"))
        chain()
        errors = []
        for i in checked:
            x, state, weight, bias = inputs[i]
            exact = causal_conv1d_update_reference(
                x.double(), before[i], weight.double(), bias.double(), "silu", slots
            )
            errors += [compare("out", chain.outputs[i], exact), compare("state", state, before[i])]
        return errors

    def measure(samples: int) -> Samples:
        return replayed(chain, samples).scaled(1 / copies)

    return Workload(check=check, measure=measure)


def update_bytes(batch: int, channels: int) -> int:
    """Input, output, and the states twice; weight and bias; all in bfloat16."""
    return 2 * channels * (batch * (2 + 2 * (TAPS - 1)) + TAPS + 1)


def _forward_case(sequences: int, length: int, channels: int) -> Case:
    moved = 4 * sequences * length * channels
    limit = limits.by_bytes(moved)
    return Case(
        name=f"forward {sequences} x {length}, D {channels}",
        unit="ms",
        sizes={"sequences": sequences, "length": length, "D": channels, "form": "forward"},
        build=partial(build_forward, sequences=sequences, length=length, channels=channels),
        limit=limit,
        target=Target(must=BYTE_MUST["conv"] * limit(H200) * 1e3),
        work=(moved, "bytes"),
    )


def _update_case(batch: int, channels: int) -> Case:
    moved = update_bytes(batch, channels)
    limit = limits.by_bytes(moved)
    return Case(
        name=f"update batch {batch}, D {channels}",
        unit="us",
        sizes={"batch": batch, "D": channels, "form": "update"},
        build=partial(build_update, batch=batch, channels=channels),
        limit=limit,
        target=Target(must=BYTE_MUST["update"] * limit(H200) * 1e6 if batch >= 32 else None),
        work=(moved, "bytes"),
    )


CASES = [_forward_case(*sizes) for sizes in FORWARD] + [_update_case(*sizes) for sizes in UPDATE]


if __name__ == "__main__":
    sys.exit(runner.main("conv", __doc__, CASES))
