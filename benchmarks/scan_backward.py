"""Selective scan, backward, over packed sequences: the gradients of every input, from saved states.

Called as this package's mixer calls its scan, or as other programs do (:data:`~benchmarks.inputs.FORMS`); D skip and
gate included. The check compares every gradient with plain torch in float64. The limit is the exponential unit, if
none were computed twice. The L2 is emptied before every sample.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from benchmarks import limits, runner
from benchmarks.case import Case, Workload
from benchmarks.checking import Error, compare
from benchmarks.inputs import FORMS, StateSpace, normal, starts
from benchmarks.peers import SCAN_BACKWARD
from benchmarks.scan import STATES
from benchmarks.timing import flushed
from tp_mamba.kernels.selective_scan.differentiable import SAVE_EVERY, SAVE_EVERY_CPU


def forward(*arguments: Any) -> list[torch.Tensor]:
    """``out, final_states, saved_states`` of the scan that gradients are taken of."""
    return list(torch.ops.tp_mamba.selective_scan_functional(*arguments))


def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, z and, where there is one, of the bias."""
    return tuple(torch.ops.tp_mamba.selective_scan_backward(*arguments))


def build(
    generator: torch.Generator, *, sequences: int, length: int, channels: int, form: str, states: int = STATES
) -> Workload:
    """The backward of a scan of ``sequences`` times ``length`` tokens in one of :data:`~benchmarks.inputs.FORMS`."""
    device, tokens = generator.device, sequences * length
    x = StateSpace.random(generator, tokens, channels, states, form)
    loc = starts(sequences, length, device)
    grad_out = normal(generator, tokens, channels).t()
    inputs = (x.u.t(), x.delta.t(), x.A, x.B.t()[None], x.C.t()[None], x.D, x.z.t(), x.delta_bias)
    names = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias")

    def arguments(given: tuple[torch.Tensor | None, ...], grad: torch.Tensor, every: int) -> tuple[Any, ...]:
        *_, saved = forward(*given, None, x.delta_softplus, loc, every)
        return (grad, None, *given, saved, x.delta_softplus, loc, every, False)

    call = arguments(inputs, grad_out, SAVE_EVERY)

    def check() -> list[Error]:
        actual = backward(*call)
        wide = tuple(None if tensor is None else tensor.double() for tensor in inputs)
        exact = torch.ops.tp_mamba.selective_scan_backward(
            *arguments(wide, grad_out.double(), SAVE_EVERY_CPU)
        )
        return [compare(*of_one) for of_one in zip(names[: len(actual)], actual, exact, strict=True)]

    return Workload(check=check, measure=partial(flushed, lambda: backward(*call)))


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
    for (sequences, length, channels), target in SCAN_BACKWARD.items()
    for form in FORMS
]


if __name__ == "__main__":
    sys.exit(runner.main("scan_backward", __doc__, CASES))
