"""One mixer layer, prefill: projections, convolution, norms and scan of falcon-mamba-7b, no collectives.

D 4096 stands for the share of one of two ranks. The limit is the four products at the rate of a large one. Called as
a program calls it, no graph; the L2 is emptied before every sample. ``--profile`` lists the kernels of one call
instead, in the order they run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import inputs, kernel_profile, limits, runner
from benchmarks.case import Case, Workload
from benchmarks.checking import Error, compare
from benchmarks.peers import LAYER
from benchmarks.reference import mixer_reference, state_like
from benchmarks.timing import flushed
from tp_mamba.batch import MambaMetadata, MambaMetadataBuilder
from tp_mamba.mixer import MambaMixer, MambaState

HIDDEN, RANK, STATES = 4096, 256, 16


def prepare(
    generator: torch.Generator, *, sequences: int, length: int, hidden: int, channels: int, rank: int
) -> tuple[MambaMixer, torch.Tensor, MambaMetadata, MambaState]:
    """A mixer, ``h [T, H]``, and fresh sequences in slots ``0 .. S-1``."""
    mixer = inputs.mixer(generator, hidden, channels, rank, states=STATES)
    h_TH = inputs.normal(generator, sequences * length, hidden)
    metadata = MambaMetadataBuilder(generator.device).build(
        prefill_slots=range(sequences),
        prefill_lengths=[length] * sequences,
        has_initial_states=[False] * sequences,
    )
    return mixer, h_TH, metadata, empty_state(mixer, sequences)


def empty_state(mixer: MambaMixer, slots: int) -> MambaState:
    """Slots laid out as :class:`tp_mamba.MambaCache` lays them out, with NaN in them."""
    layouts = zip(mixer.get_state_shape(), mixer.get_state_dtype(), strict=True)
    nan = float("nan")
    conv, ssm = (
        torch.full((slots, width, channels), nan, dtype=dtype, device=mixer.A.device).mT
        for (channels, width), dtype in layouts
    )
    return MambaState(conv, ssm)


def build(
    generator: torch.Generator,
    *,
    sequences: int,
    length: int,
    channels: int,
    hidden: int = HIDDEN,
    rank: int = RANK,
) -> Workload:
    """The mixer over ``sequences`` times ``length`` packed tokens from their beginning."""
    mixer, h_TH, metadata, state = prepare(
        generator, sequences=sequences, length=length, hidden=hidden, channels=channels, rank=rank
    )

    def check() -> list[Error]:
        for slots in state:
            slots.fill_(float("nan"))
        out_TH = mixer(h_TH, metadata, state)

        def reference(dtype: torch.dtype) -> tuple[torch.Tensor, MambaState]:
            advanced = state_like(MambaState(*map(torch.zeros_like, state)), dtype)
            loc = metadata.query_start_loc
            return mixer_reference(mixer, h_TH, loc, advanced, continues=False, dtype=dtype), advanced

        exact, exact_state = reference(torch.float64)
        rounded, rounded_state = reference(h_TH.dtype)
        return [
            compare("out", out_TH, exact, rounded=rounded),
            compare("conv state", state.conv_state, exact_state.conv_state, rounded=rounded_state.conv_state),
            compare("state", state.ssm_state, exact_state.ssm_state, rounded=rounded_state.ssm_state),
        ]

    return Workload(check=check, measure=partial(flushed, lambda: mixer(h_TH, metadata, state)))


def flops(tokens: int, channels: int, hidden: int = HIDDEN, rank: int = RANK, states: int = STATES) -> int:
    """Operations of the four products."""
    weights = hidden * 2 * channels + channels * (rank + 2 * states) + rank * channels + channels * hidden
    return 2 * tokens * weights


CASES = [
    Case(
        name=f"{sequences} x {length}, D {channels}",
        unit="ms",
        sizes={"sequences": sequences, "length": length, "D": channels},
        build=partial(build, sequences=sequences, length=length, channels=channels),
        limit=limits.by_flops(flops(sequences * length, channels)),
        target=target,
        work=(sequences * length, "tokens"),
    )
    for (sequences, length, channels), target in LAYER.items()
]


@torch.no_grad()
def profile(cases: Sequence[Case], seed: int | None) -> None:
    """Print the kernels of one call of each of ``cases``; nothing is checked."""
    for case in cases:
        sequences, length, channels = (int(case.sizes[size]) for size in ("sequences", "length", "D"))
        generator = torch.Generator("cuda").manual_seed(seed or 0)
        mixer, h_TH, metadata, state = prepare(
            generator, sequences=sequences, length=length, hidden=HIDDEN, channels=channels, rank=RANK
        )
        kernel_profile.show(case.name, partial(mixer, h_TH, metadata, state))


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.parser("layer", __doc__, CASES, samples=30)
    parser.add_argument(
        "--profile", action="store_true", help="list the kernels of one call, with their times"
    )
    options = parser.parse_args(argv)
    if not runner.has_gpu("layer"):
        return 2
    if options.profile:
        chosen = runner.choose("layer", CASES, options.cases)
        profile(chosen, options.seed)
        return 0 if chosen else 2
    return runner.run("layer", CASES, options, torch.device("cuda"))


if __name__ == "__main__":
    sys.exit(main())
