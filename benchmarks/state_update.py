"""The one-token update of the SSM state, in slots, with D skip and gate.

"full" has softplus and bias inside and B and C in bfloat16, as other programs call theirs; "mixer" gets its time
steps after softplus and B and C in float32. The limit is bytes: every input once, the float32 state read and written.
Calls run in one CUDA graph, each on tensors of its own, so that states come from memory.
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
from benchmarks.inputs import FORMS, StateSpace, normal
from benchmarks.peers import BYTE_MUST, STATE_UPDATE, Target
from benchmarks.reference import scan_reference
from benchmarks.timing import Samples, replayed
from tp_mamba.kernels.selective_state_update import selective_state_update

STATES = 16
SIZES = [(batch, channels) for channels in (8192, 4096) for batch in (1, 8, 32, 128, 256)]


def build(
    generator: torch.Generator,
    *,
    batch: int,
    channels: int,
    form: str,
    states: int = STATES,
    copies: int | None = None,
) -> Workload:
    """One token of each of ``batch`` sequences, ``copies`` times, by default until memory is what counts."""
    device = generator.device
    copies = copies or links(moved_bytes(batch, channels, states, form))
    slots = torch.randperm(batch, generator=generator, device=device).int()
    inputs = [StateSpace.random(generator, batch, channels, states, form) for _ in range(copies)]
    held = [normal(generator, batch, states, channels, dtype=torch.float32).mT for _ in range(copies)]

    def call(x: StateSpace, state: torch.Tensor) -> torch.Tensor:
        return selective_state_update(
            state,
            x.u,
            x.delta,
            x.A,
            x.B,
            x.C,
            x.D,
            x.z,
            x.delta_bias,
            x.delta_softplus,
            slots,
        )

    chain = Chain([partial(call, x, state) for x, state in zip(inputs, held, strict=True)], device)

    def check() -> list[Error]:
        checked = sorted({0, copies - 1})
        before = {i: held[i].double() for i in checked}
        for out in chain.outputs:
            out.fill_(float("nan"))
        chain()
        return [
            error
            for i in checked
            for error in _compare(inputs[i], chain.outputs[i], held[i], before[i], slots)
        ]

    def measure(samples: int) -> Samples:
        return replayed(chain, samples).scaled(1 / copies)

    return Workload(check=check, measure=measure)


def _compare(
    x: StateSpace, out: torch.Tensor, state: torch.Tensor, before: torch.Tensor, slots: torch.Tensor
) -> list[Error]:
    """Against the scan over sequences of one token, which is the same mathematics a whole row at a time."""
    exact_out, _ = scan_reference(
        x,
        torch.arange(len(slots) + 1),
        cache_indices=slots,
        has_initial_state=torch.ones_like(slots, dtype=torch.bool),
        ssm_states=before,
    )
    return [compare("out", out.t(), exact_out), compare("state", state, before)]


def moved_bytes(batch: int, channels: int, states: int, form: str) -> int:
    """State twice; u, delta, z and output in bfloat16; A, D and the bias in float32; B and C."""
    a_token = 8 * channels * states + 8 * channels + 2 * states * (4 if form == "mixer" else 2)
    return batch * a_token + 4 * channels * (states + (2 if form == "full" else 1))


def _case(batch: int, channels: int, form: str) -> Case:
    moved = moved_bytes(batch, channels, STATES, form)
    limit = limits.by_bytes_of_a_step(moved)
    recorded = STATE_UPDATE.get((batch, channels), Target())
    must = BYTE_MUST["update"] * limit(H200) * 1e6 if batch >= 32 else None
    return Case(
        name=f"batch {batch}, D {channels}, {form}",
        unit="us",
        sizes={"batch": batch, "D": channels, "form": form},
        build=partial(build, batch=batch, channels=channels, form=form),
        limit=limit,
        target=Target(must=must, peers=recorded.peers),
        work=(moved, "bytes"),
    )


CASES = [_case(batch, channels, form) for batch, channels in SIZES for form in FORMS]


if __name__ == "__main__":
    sys.exit(runner.main("state_update", __doc__, CASES))
