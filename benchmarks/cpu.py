"""mamba-130m on CPU threads, float32, random weights: prefill and greedy decode.

Prefill gives the logits of every token; decode is the package's own generation, the time of a token after the first.
The limit is this machine's: the model's products alone, at the same sizes, timed beside it. Compare with the recorded
times on two cores: ``--threads 2``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import inputs, runner
from benchmarks.case import Case, Workload
from benchmarks.checking import FLOAT32_SUMS, Error, compare
from benchmarks.peers import CPU_DECODE, CPU_PREFILL
from benchmarks.reference import model_reference
from benchmarks.timing import Samples, on_host
from tp_mamba.config import MambaConfig
from tp_mamba.engine.params import SamplingParams
from tp_mamba.layers.init import skip_init
from tp_mamba.model import MambaForCausalLM

MODEL = MambaConfig(
    model_type="mamba",
    hidden_size=768,
    intermediate_size=1536,
    num_hidden_layers=24,
    state_size=16,
    conv_kernel=4,
    time_step_rank=48,
    vocab_size=50_280,
)
THREADS = 2
"""Threads that the recorded times were taken with."""
PROMPT, NEW = 32, 32
FLOAT32_PREFIX = 128
"""Tokens over which the reference is also run in float32, to see what rounding alone costs."""
ROUNDS = 4.0
"""How many times that is allowed: sums in another order differ as much as they err, and 24 layers pass it on."""


def make_model(generator: torch.Generator, config: MambaConfig) -> MambaForCausalLM:
    """A float32 model with random weights."""
    with skip_init():
        model = MambaForCausalLM(config, dtype=torch.float32, device="cpu")
    inputs.randomize_model(model, generator)
    return model


def build_prefill(generator: torch.Generator, *, tokens: int, config: MambaConfig = MODEL) -> Workload:
    """The logits of one sequence of ``tokens`` tokens."""
    model = make_model(generator, config)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=generator)

    def check() -> list[Error]:
        logits = model(ids)[0]
        exact = model_reference(model, ids[0], torch.float64)
        prefix = min(tokens, FLOAT32_PREFIX)
        rounded = model_reference(model, ids[0, :prefix], torch.float32)
        return [
            compare("logits", logits, exact, rounded=rounded, rounded_exact=exact[:prefix], rounds=ROUNDS)
        ]

    return Workload(
        check=check,
        measure=partial(on_host, partial(model, ids)),
        limit=products(model, tokens, tokens),
    )


def build_decode(
    generator: torch.Generator, *, prompt: int = PROMPT, new: int = NEW, config: MambaConfig = MODEL
) -> Workload:
    """``new`` greedy tokens after a prompt of ``prompt`` tokens."""
    model = make_model(generator, config)
    ids = torch.randint(config.vocab_size, (prompt,), generator=generator).tolist()
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)

    def check() -> list[Error]:
        chosen = model.generate([ids], params)[0].token_ids
        exact = model_reference(model, torch.tensor(ids + chosen[:-1]), torch.float64)[prompt - 1 :]
        return [greedy_error(chosen, exact)]

    def seconds_a_token() -> float:
        stamps = [time.perf_counter() for _ in model.stream([ids], params)]
        return (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    def measure(samples: int) -> Samples:
        seconds_a_token()
        return Samples(tuple(seconds_a_token() for _ in range(samples)))

    return Workload(check=check, measure=measure, limit=products(model, 1, 1))


def greedy_error(chosen: Sequence[int], exact: torch.Tensor) -> Error:
    """How far the float64 logits of the chosen tokens lie below the largest, relative to the largest of all."""
    below = exact.amax(dim=1) - exact[torch.arange(len(chosen)), torch.tensor(chosen)]
    size = exact.abs().max()
    allowed = 10 * FLOAT32_SUMS
    return Error("chosen logits", float(below.norm() / size), allowed, float(below.max() / size), allowed)


def products(model: MambaForCausalLM, tokens: int, logits: int) -> float:
    """Seconds of the model's products alone, over ``tokens`` tokens and for the logits of ``logits`` of them."""
    layers = [
        layer
        for mixer in model.mixers()
        for layer in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    ]
    given = {size: torch.randn(tokens, size) for size in {layer.weight.shape[1] for layer in layers}}
    h = torch.randn(logits, model.lm_head.weight.shape[1])

    def run() -> None:
        for layer in layers:
            layer(given[layer.weight.shape[1]])
        model.lm_head(h)

    with torch.no_grad():
        return on_host(run, 5 if tokens > 1 else 20).median


CASES = [
    Case(
        name=f"prefill {tokens} tokens",
        unit="s",
        sizes={"sequences": 1, "length": tokens, "D": MODEL.intermediate_size, "form": "cpu"},
        build=partial(build_prefill, tokens=tokens),
        target=target,
        work=(tokens, "tokens"),
    )
    for tokens, target in CPU_PREFILL.items()
] + [
    Case(
        name="greedy decode, a token",
        unit="ms",
        sizes={"batch": 1, "D": MODEL.intermediate_size, "form": "cpu"},
        build=build_decode,
        target=CPU_DECODE,
        work=(1, "tokens"),
    )
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = runner.parser("cpu", __doc__, CASES, samples=5)
    parser.add_argument(
        "--threads",
        metavar="N",
        type=runner.positive,
        help="how many threads to use (default: torch's choice)",
    )
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if torch.get_num_threads() != THREADS:
        print(
            f"Goals and recorded times are those of {THREADS} threads, this run has {torch.get_num_threads()}: "
            f"--threads {THREADS} compares like with like.",
            file=sys.stderr,
        )
    return runner.run("cpu", CASES, options, torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
