"""Selective scan, forward, over packed sequences: one long one, many short ones.

Each case is measured as other programs call their scan ("full": softplus and bias inside, B and C in bfloat16) and as
this package's mixer calls its own ("mixer": time steps after softplus, B and C in float32); D skip and gate included,
final states written to slots in float32. The limit is the exponential unit. The L2 is emptied before every sample.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks import limits, runner
from benchmarks.case import Case, Workload
from benchmarks.checking import Error, compare
from benchmarks.inputs import FORMS, StateSpace, starts
from benchmarks.peers import SCAN
from benchmarks.reference import scan_reference
from benchmarks.timing import flushed
from tp_mamba.kernels.selective_scan import selective_scan_fn

STATES = 16
REFERENCE_ELEMENTS = 1 << 31
"""Tokens by channels by states that the reference may hold (twice, in float64); beyond that, some channels do."""


def build(
    generator: torch.Generator, *, sequences: int, length: int, channels: int, form: str, states: int = STATES
) -> Workload:
    """A scan of ``sequences`` times ``length`` tokens in one of :data:`~benchmarks.inputs.FORMS`."""
    device, tokens = generator.device, sequences * length
    x = StateSpace.random(generator, tokens, channels, states, form)
    loc = starts(sequences, length, device)
    slots = torch.randperm(sequences, generator=generator, device=device).int()
    fresh = torch.zeros(sequences, dtype=torch.bool, device=device)
    ssm_states = torch.empty(sequences, states, channels, device=device).mT
    out_TD = torch.empty_like(x.u)

    def run() -> None:
        selective_scan_fn(
            x.u.t(),
            x.delta.t(),
            x.A,
            x.B.t(),
            x.C.t(),
            x.D,
            x.z.t(),
            x.delta_bias,
            x.delta_softplus,
            query_start_loc=loc,
            cache_indices=slots,
            has_initial_state=fresh,
            ssm_states=ssm_states,
            out=out_TD.t(),
        )

    def check() -> list[Error]:
        out_TD.fill_(float("nan"))
        ssm_states.fill_(float("nan"))
        run()
        chosen = checked_channels(tokens, channels, states, device)
        exact_out, exact_state = scan_reference(x, loc, channels=chosen)
        return [
            compare("out", out_TD[:, chosen].t(), exact_out),
            compare("state", ssm_states[slots.long()][:, chosen], exact_state),
        ]

    return Workload(check=check, measure=partial(flushed, run))


def checked_channels(tokens: int, channels: int, states: int, device: torch.device) -> torch.Tensor:
    """Which channels are compared, over all tokens: all, or evenly spread ones where the reference is too large."""
    count = max(1, min(channels, REFERENCE_ELEMENTS // (tokens * states)))
    return torch.linspace(0, channels - 1, count, device=device, dtype=torch.float64).round().long()


CASES = [
    Case(
        name=f"{sequences} x {length}, D {channels}, {form}",
        unit="ms",
        sizes={"sequences": sequences, "length": length, "D": channels, "form": form},
        build=partial(build, sequences=sequences, length=length, channels=channels, form=form),
        limit=limits.by_exponentials(sequences * length, channels, STATES),
        target=target,
        work=(sequences * length, "tokens"),
    )
    for (sequences, length, channels), target in SCAN.items()
    for form in FORMS
]


if __name__ == "__main__":
    sys.exit(runner.main("scan", __doc__, CASES))
