"""The backwards of the convolution, of residual add and norm, and of dt_proj's softplus.

Calls are those that autograd makes: gradients of activations and of weights, sums over tokens included. The limit is
bytes, every gradient and saved activation once; products of the gradients with weights and inputs are the library's and
not timed. The residual stream is float32, everything else bfloat16. The L2 is emptied before every sample.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import limits, runner
from benchmarks.case import Case, Workload
from benchmarks.checking import Error, compare
from benchmarks.inputs import normal, starts
from benchmarks.timing import flushed

TAPS, EPS = 4, 1e-5
Gradients = tuple[torch.Tensor, ...]


def convolution(
    dout_TD: torch.Tensor, x_TD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, loc: torch.Tensor
) -> Gradients:
    """``(dx [T, D], dweight, dbias)`` of the convolution with SiLU of packed sequences."""
    dx, dweight, dbias, _ = torch.ops.tp_mamba.causal_conv1d_backward(
        dout_TD.t(), None, x_TD.t(), weight, bias, True, None, loc
    )
    return dx.t(), dweight, dbias


def added_norm(
    dout: torch.Tensor, dsum: torch.Tensor, total: torch.Tensor, weight: torch.Tensor
) -> Gradients:
    """``(dx, dresidual, dweight)`` of ``add_rms_norm``, from the sum that the forward wrote."""
    gradients: Gradients = torch.ops.tp_mamba.rms_norm_backward(
        dout, dsum, total, None, weight, EPS, dout.dtype, dsum.dtype
    )
    return gradients


def time_steps(dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Gradients:
    """``(dv, dbias)`` of ``softplus(v)``, ``v = x @ weight.T + bias``, which is computed anew."""
    gradients: Gradients = torch.ops.tp_mamba.linear_softplus_backward(dout, x, weight, bias, x.dtype)
    return gradients


def build_convolution(generator: torch.Generator, *, sequences: int, length: int, channels: int) -> Workload:
    """``sequences`` times ``length`` packed tokens; x is a half of in_proj's output."""
    tokens = sequences * length
    inputs = (
        normal(generator, tokens, channels),
        normal(generator, tokens, 2 * channels)[:, :channels],
        normal(generator, channels, TAPS, std=0.5),
        normal(generator, channels, std=0.3),
    )
    loc = starts(sequences, length, generator.device)

    def exact(*given: torch.Tensor) -> Gradients:
        dout, x, weight, bias = given
        dx, *rest = torch.ops.tp_mamba.causal_conv1d_backward(
            dout.t(), None, x.t(), weight, bias, True, None, loc
        )
        return dx.t(), rest[0], rest[1]

    names = ("dx", "dweight", "dbias")
    return _workload(partial(convolution, loc=loc), exact, names, inputs)


def build_added_norm(generator: torch.Generator, *, tokens: int, hidden: int) -> Workload:
    """``[T, H]``; the stream, which the forward kept, and its gradient in float32."""
    inputs = (
        normal(generator, tokens, hidden),
        normal(generator, tokens, hidden, dtype=torch.float32),
        normal(generator, tokens, hidden, std=3.0, dtype=torch.float32),
        normal(generator, hidden, mean=1.0, std=0.3),
    )

    def exact(*given: torch.Tensor) -> Gradients:
        dx, _, dweight = torch.ops.tp_mamba.rms_norm_backward(
            given[0], given[1], given[2], None, given[3], EPS, torch.float64, torch.float64
        )
        return dx, dx, dweight

    names = ("dx", "dresidual", "dweight")
    return _workload(lambda *given: added_norm(*given), exact, names, inputs)


def build_time_steps(generator: torch.Generator, *, tokens: int, channels: int, rank: int) -> Workload:
    """``x [T, R]``, ``weight [D, R]``, and a bias in float32 that makes time steps as small as a model's."""
    inputs = (
        normal(generator, tokens, channels),
        normal(generator, tokens, rank),
        normal(generator, channels, rank, std=rank**-0.5),
        normal(generator, channels, mean=-4.0, dtype=torch.float32),
    )

    def exact(*given: torch.Tensor) -> Gradients:
        gradients: Gradients = torch.ops.tp_mamba.linear_softplus_backward(*given, torch.float64)
        return gradients

    return _workload(lambda *given: time_steps(*given), exact, ("dv", "dbias"), inputs)


def _workload(
    call: Callable[..., Gradients],
    exact: Callable[..., Gradients],
    names: tuple[str, ...],
    inputs: tuple[torch.Tensor, ...],
) -> Workload:
    def check() -> list[Error]:
        # In float64 the operators are their formulas in plain torch, which the tests hold against autograd.
        wanted = exact(*(tensor.double() for tensor in inputs))
        return [compare(*each) for each in zip(names, call(*inputs), wanted, strict=True)]

    return Workload(check=check, measure=partial(flushed, lambda: call(*inputs)))


def _case(
    name: str, bytes_per_element: int, elements: int, build: Callable[..., Workload], **sizes: int
) -> Case:
    moved = bytes_per_element * elements
    return Case(
        name=name,
        unit="us",
        sizes={**sizes, "form": name.partition(" ")[0]},
        build=partial(build, **sizes),
        limit=limits.by_bytes(moved),
        work=(moved, "bytes"),
    )


TOKENS = 8192
CASES = [
    *(
        _case(
            f"conv {sequences} x {TOKENS // sequences}, D {D}", 6, TOKENS * D, build_convolution,
            sequences=sequences, length=TOKENS // sequences, channels=D,
        )
        for sequences, D in ((1, 8192), (16, 8192), (1, 5120), (1, 4096))
    ),
    *(
        _case(f"norm T {TOKENS}, H {H}", 16, TOKENS * H, build_added_norm, tokens=TOKENS, hidden=H)
        for H in (4096, 2560)
    ),
    *(
        _case(
            f"dt T {TOKENS}, D {D}, R {R}", 4, TOKENS * D, build_time_steps, tokens=TOKENS, channels=D, rank=R
        )
        for D, R in ((8192, 256), (5120, 160))
    ),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(runner.main("backward", __doc__, CASES))
