"""Long input: 262,144 tokens in one call, and the peak memory of chunked prefill.

At D 8192 a [T, 2D] tensor of 262,144 tokens has 2^32 elements, beyond what 32-bit offsets reach. Convolution and scan
are compared with float64 over all tokens, on channels spread over all of D; a whole layer over its first tokens, and
over all tokens with the same layer in chunks. Chunked prefill is a generation of one token by two layers of
falcon-mamba-7b, 8192 tokens at a time: its peak is what lies above the weights, and its case is the peak at 131,072
tokens over that at 16,384.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import torch

from benchmarks import inputs, limits, runner
from benchmarks.case import Case, Workload
from benchmarks.checking import Error, compare
from benchmarks.inputs import StateSpace
from benchmarks.layer import HIDDEN, RANK, STATES, empty_state, flops
from benchmarks.peers import MEMORY
from benchmarks.reference import mixer_reference, model_reference, scan_reference
from benchmarks.timing import Samples, flushed
from tp_mamba.batch import MambaMetadata, MambaMetadataBuilder
from tp_mamba.config import MambaConfig
from tp_mamba.engine.params import SamplingParams
from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn
from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.layers.init import skip_init
from tp_mamba.model import MambaForCausalLM

TOKENS, CHANNELS = 262_144, 8192
CHUNK = 16_384
"""Tokens of a call in the layer that is compared with one call."""
PREFIX = 2048
"""Tokens over which a whole layer is compared with float64."""
PREFILL, SHORT, LONG = 8192, 16_384, 131_072
MODEL = MambaConfig(
    model_type="falcon_mamba",
    hidden_size=HIDDEN,
    intermediate_size=CHANNELS,
    num_hidden_layers=2,
    state_size=STATES,
    conv_kernel=4,
    time_step_rank=RANK,
    vocab_size=65_024,
    tie_word_embeddings=False,
    mixer_norm="weightless",
)


def build_kernels(
    generator: torch.Generator, *, tokens: int, channels: int, checked: int, states: int = STATES
) -> Workload:
    """Convolution and scan of one sequence, x and z halves of one ``[T, 2D]`` tensor."""
    device = generator.device
    x_TD, z_TD = inputs.normal(generator, tokens, 2 * channels).chunk(2, dim=1)
    ssm = StateSpace.random(generator, tokens, channels, states, "mixer")
    ssm = replace(ssm, u=torch.empty_like(ssm.u), z=z_TD)
    weight, bias = inputs.normal(generator, channels, 4, std=0.5), inputs.normal(generator, channels, std=0.3)
    loc = inputs.starts(1, tokens, device)
    y_TD, last_state = torch.empty_like(ssm.u), torch.empty(1, states, channels, device=device).mT

    def run() -> None:
        causal_conv1d_fn(x_TD.t(), weight, bias, activation="silu", query_start_loc=loc, out=ssm.u.t())
        selective_scan_fn(
            ssm.u.t(),
            ssm.delta.t(),
            ssm.A,
            ssm.B.t(),
            ssm.C.t(),
            ssm.D,
            ssm.z.t(),
            query_start_loc=loc,
            ssm_states=last_state,
            out=y_TD.t(),
        )

    def check() -> list[Error]:
        for output in (ssm.u, y_TD, last_state):
            output.fill_(float("nan"))
        run()
        # On the host: with few channels its loop over the tokens is the faster one.
        chosen = torch.linspace(0, channels - 1, checked).round().long().to(device)
        exact_u = causal_conv1d_reference(
            x_TD[:, chosen].t().cpu().double(),
            weight[chosen].cpu().double(),
            bias[chosen].cpu().double(),
            "silu",
            query_start_loc=loc.cpu(),
        )
        # The scan starts from u as it was rounded, so that its own error is what is seen.
        exact_y, exact_state = scan_reference(ssm, loc.cpu(), channels=chosen, device="cpu")
        return [
            compare("conv", ssm.u[:, chosen].t(), exact_u),
            compare("scan", y_TD[:, chosen].t(), exact_y),
            compare("state", last_state[:, chosen], exact_state),
        ]

    return Workload(check=check, measure=partial(flushed, run))


def build_layer(
    generator: torch.Generator,
    *,
    tokens: int,
    channels: int,
    chunk: int,
    prefix: int,
    hidden: int = HIDDEN,
    rank: int = RANK,
) -> Workload:
    """A mixer over one sequence in one call."""
    mixer = inputs.mixer(generator, hidden, channels, rank, states=STATES)
    h_TH = inputs.normal(generator, tokens, hidden)
    builder, state = MambaMetadataBuilder(generator.device), empty_state(mixer, 1)

    def metadata(length: int, continues: bool) -> MambaMetadata:
        return builder.build(prefill_slots=[0], prefill_lengths=[length], has_initial_states=[continues])

    whole = metadata(tokens, False)

    def check() -> list[Error]:
        out_TH = mixer(h_TH, whole, state)
        last = tuple(slots.clone() for slots in state)
        loc = torch.tensor([0, prefix])
        exact, rounded = (
            mixer_reference(mixer, h_TH[:prefix], loc, None, continues=False, dtype=dtype)
            for dtype in (torch.float64, h_TH.dtype)
        )
        errors = [compare("first tokens", out_TH[:prefix], exact, rounded=rounded)]
        for slots in state:
            slots.fill_(float("nan"))
        for start in range(0, tokens, chunk):
            piece = h_TH[start : start + chunk]
            out_piece = mixer(piece, metadata(piece.shape[0], start > 0), state)
            errors.append(
                compare(
                    "all tokens, in chunks",
                    out_TH[start : start + chunk],
                    out_piece.double(),
                    rounded=rounded,
                    rounded_exact=exact,
                )
            )
        errors.append(
            compare(
                "state, in chunks", last[1], state.ssm_state.double(), rounded=rounded, rounded_exact=exact
            )
        )
        return errors

    return Workload(check=check, measure=partial(flushed, lambda: mixer(h_TH, whole, state)))


def build_memory(
    generator: torch.Generator, *, config: MambaConfig, chunk: int, short: int, long: int
) -> Workload:
    """Chunked prefill of ``short`` and of ``long`` tokens, ``chunk`` at a time."""
    device = generator.device
    with skip_init():
        model = MambaForCausalLM(config, dtype=torch.bfloat16, device=device)
    inputs.randomize_model(model, generator)
    ids = torch.randint(config.vocab_size, (long,), generator=generator, device=device)
    prompt = ids.tolist()

    def check() -> list[Error]:
        ids_T = ids[:short]
        exact, rounded = (model_reference(model, ids_T, dtype)[-1] for dtype in (torch.float64, model.dtype))
        return [compare("last logits", chunked_logits(model, ids_T, chunk), exact, rounded=rounded)]

    def measure(_: int) -> Samples:
        ratio = peak(model, prompt, chunk) / peak(model, prompt[:short], chunk)
        return Samples((ratio,))

    return Workload(check=check, measure=measure)


def chunked_logits(model: MambaForCausalLM, ids_T: torch.Tensor, chunk: int) -> torch.Tensor:
    """The last token's logits ``[V]`` after a prefill in pieces."""
    cache, builder = model.new_cache(1), MambaMetadataBuilder(ids_T.device)
    slot = cache.allocate()
    logits = torch.empty(0)
    for start in range(0, ids_T.shape[0], chunk):
        piece = ids_T[start : start + chunk]
        metadata = builder.build(
            prefill_slots=[slot], prefill_lengths=[piece.shape[0]], has_initial_states=[start > 0]
        )
        last = torch.tensor([piece.shape[0] - 1], device=ids_T.device)
        logits = model.forward_packed(piece, metadata, cache, logits_indices=last)[0]
    return logits


def peak(model: MambaForCausalLM, prompt: list[int], chunk: int) -> int:
    """Bytes that generating one token allocates at most, above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.generate([prompt], SamplingParams(max_new_tokens=1), max_prefill_tokens=chunk)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


CASES = [
    Case(
        name=f"convolution and scan, 1 x {TOKENS}, D {CHANNELS}",
        unit="ms",
        sizes={"sequences": 1, "length": TOKENS, "D": CHANNELS, "form": "kernels"},
        build=partial(build_kernels, tokens=TOKENS, channels=CHANNELS, checked=16),
        limit=limits.in_turn(
            limits.by_exponentials(TOKENS, CHANNELS, STATES), limits.by_bytes(4 * TOKENS * CHANNELS)
        ),
        work=(TOKENS, "tokens"),
    ),
    Case(
        name=f"layer, 1 x {TOKENS}, D {CHANNELS}",
        unit="ms",
        sizes={"sequences": 1, "length": TOKENS, "D": CHANNELS, "form": "layer"},
        build=partial(build_layer, tokens=TOKENS, channels=CHANNELS, chunk=CHUNK, prefix=PREFIX),
        limit=limits.by_flops(flops(TOKENS, CHANNELS)),
        work=(TOKENS, "tokens"),
    ),
    Case(
        name=f"peak memory of chunked prefill, {LONG} tokens over {SHORT}",
        unit="x",
        sizes={"length": LONG, "D": CHANNELS, "form": "memory"},
        build=partial(build_memory, config=MODEL, chunk=PREFILL, short=SHORT, long=LONG),
        target=MEMORY,
    ),
]


if __name__ == "__main__":
    sys.exit(runner.main("long", __doc__, CASES, samples=10))
