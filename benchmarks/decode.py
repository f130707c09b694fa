"""One layer's decode step in a CUDA graph: residual add, norm and mixer of falcon-mamba-7b, no collectives.

D 4096 stands for the share of one of two ranks. Eight layers, each with weights and states of its own, are captured
in one graph, each fed by the one before, and the time is an eighth of a replay's: as in a model, weights and states
come from memory, since those of seven other layers have been through the L2 in between. The limit is bytes: all
parameters once, the states read and written.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import inputs, limits, runner
from benchmarks.case import Case, Workload
from benchmarks.chain import Chain
from benchmarks.checking import Error, compare
from benchmarks.peers import DECODE
from benchmarks.reference import block_reference, state_like
from benchmarks.timing import Samples, replayed
from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.mixer import MambaMixer, MambaState

HIDDEN, RANK, STATES, TAPS = 4096, 256, 16, 4
LAYERS = 8


class Layer(NamedTuple):
    norm: RMSNorm
    mixer: MambaMixer
    state: MambaState


def make_layer(
    generator: torch.Generator, batch: int, hidden: int, channels: int, rank: int, states: int
) -> Layer:
    """A block with random weights and the random states of ``batch`` sequences."""
    norm = RMSNorm(hidden, 1e-5, dtype=torch.bfloat16, device=generator.device).requires_grad_(False)
    inputs.randomize_norm(norm, generator)
    mixer = inputs.mixer(generator, hidden, channels, rank, states=states)
    conv_dtype, ssm_dtype = mixer.get_state_dtype()
    state = MambaState(
        inputs.normal(generator, batch, mixer.conv_kernel_size - 1, channels, dtype=conv_dtype).mT,
        inputs.normal(generator, batch, states, channels, dtype=ssm_dtype).mT,
    )
    return Layer(norm, mixer, state)


class Step:
    """The decode step of some layers, one after the other, as one call of a chain each."""

    def __init__(self, layers: list[Layer], h_BH: torch.Tensor, residual_BH: torch.Tensor) -> None:
        self.layers, self.first = layers, (h_BH, residual_BH)
        slots = range(h_BH.shape[0])
        self.metadata = MambaMetadataBuilder(h_BH.device).build(decode_slots=slots)
        self._stream = self.first

    def calls(self) -> list[partial[tuple[torch.Tensor, torch.Tensor]]]:
        return [partial(self._call, i) for i in range(len(self.layers))]

    def _call(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(h, residual)`` after layer ``i``."""
        norm, mixer, state = self.layers[i]
        h_BH, residual_BH = norm.add(*(self.first if i == 0 else self._stream))
        self._stream = mixer(h_BH, self.metadata, state), residual_BH
        return self._stream


def build(
    generator: torch.Generator,
    *,
    batch: int,
    channels: int,
    hidden: int = HIDDEN,
    rank: int = RANK,
    states: int = STATES,
    layers: int = LAYERS,
) -> Workload:
    """``layers`` blocks in one graph, for ``batch`` sequences."""
    made = [make_layer(generator, batch, hidden, channels, rank, states) for _ in range(layers)]
    h_BH = inputs.normal(generator, batch, hidden)
    residual_BH = inputs.normal(generator, batch, hidden, std=3.0, dtype=torch.float32)
    step = Step(made, h_BH, residual_BH)
    chain = Chain(step.calls(), generator.device)

    def check() -> list[Error]:
        before = [MambaState(*(s.clone() for s in layer.state)) for layer in made]
        for output in chain.outputs:
            for tensor in output:
                tensor.fill_(float("nan"))
        chain()
        errors: list[Error] = []
        stream = step.first
        for layer, held, output in zip(made, before, chain.outputs, strict=True):
            # Each layer from what it was really given, so that errors do not add up from layer to layer.
            errors += _compare(layer, held, stream, output)
            stream = output
        return errors

    def measure(samples: int) -> Samples:
        return replayed(chain, samples).scaled(1 / layers)

    return Workload(check=check, measure=measure)


def _compare(
    layer: Layer,
    before: MambaState,
    given: tuple[torch.Tensor, torch.Tensor],
    output: tuple[torch.Tensor, torch.Tensor],
) -> list[Error]:
    def reference(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        state = state_like(before, dtype)
        loc = torch.arange(given[0].shape[0] + 1)
        h, residual = block_reference(
            layer.norm, layer.mixer, *given, loc, state, continues=True, dtype=dtype
        )
        return {"out": h, "residual": residual, "conv state": state.conv_state, "state": state.ssm_state}

    exact, rounded = reference(torch.float64), reference(output[0].dtype)
    actual = dict(zip(exact, (*output, *layer.state), strict=True))
    return [compare(name, actual[name], exact[name], rounded=rounded[name]) for name in exact]


def moved_bytes(
    batch: int, channels: int, hidden: int = HIDDEN, rank: int = RANK, states: int = STATES, taps: int = TAPS
) -> int:
    """bfloat16 weights, A, D and the bias in float32, each once; a token's states twice, the SSM's in float32."""
    weights = 3 * hidden * channels + channels * (rank + 2 * states) + rank * channels
    small = hidden + channels * (taps + 1)
    wide = channels * (states + 2)
    state = 2 * batch * channels * (4 * states + 2 * (taps - 1))
    return 2 * (weights + small) + 4 * wide + state


CASES = [
    Case(
        name=f"batch {batch}, D {channels}",
        unit="us",
        sizes={"batch": batch, "D": channels},
        build=partial(build, batch=batch, channels=channels),
        limit=limits.by_bytes_of_a_step(moved_bytes(batch, channels)),
        target=target,
        work=(batch, "tokens"),
    )
    for (batch, channels), target in DECODE.items()
]


if __name__ == "__main__":
    sys.exit(runner.main("decode", __doc__, CASES, samples=100))
