"""falcon-mamba-7b as a whole: a token and a prompt, as a user gets them and as bare replays, on one GPU or two.

Random weights, 64 layers, bfloat16. "As generate" is wall time: between the steps of an engine for a token, from a
request to its first token for a prompt. "Replay" is the device's time of the same captured step alone, so the ratio of
the two is what the host costs. Steps above the ladder (:mod:`tp_mamba.engine.ladder`) are not captured.

Two GPUs: torchrun --nproc-per-node 2 -m benchmarks.whole. On one GPU the logits behind the beginning of a prompt, and
of some steps after it, are compared with float64. On two no rank has the weights of a reference: captured steps are
compared with the same steps launched eagerly.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch

from benchmarks import inputs, limits, over_ranks, runner
from benchmarks.case import Case, Workload
from benchmarks.ceilings import H200
from benchmarks.checking import Error, compare
from benchmarks.decode import HIDDEN, RANK, STATES, moved_bytes
from benchmarks.layer import flops
from benchmarks.over_ranks import agree, ranks
from benchmarks.peers import WHOLE, WHOLE_ON_H200, Target
from benchmarks.reference import model_reference
from benchmarks.timing import Samples, replayed
from tp_mamba.config import MambaConfig
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.graphs import CudaCapture
from tp_mamba.engine.ladder import MAX_TOKENS, Ladder
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.runner import Runner
from tp_mamba.engine.scheduler import Chunk, Schedule
from tp_mamba.layers.init import skip_init
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

CHANNELS, LAYERS, VOCABULARY = 8192, 64, 65_024
MODEL = MambaConfig(
    model_type="falcon_mamba",
    hidden_size=HIDDEN,
    intermediate_size=CHANNELS,
    num_hidden_layers=LAYERS,
    state_size=STATES,
    conv_kernel=4,
    time_step_rank=RANK,
    vocab_size=VOCABULARY,
    tie_word_embeddings=False,
    mixer_norm="weightless",
)
PROMPT = 8
"""Tokens of each prompt before decoding, which costs the same behind any number of them."""
WARM_UP = 8
"""Steps before those that are counted: two that are run and captured, and the first replays."""
CHECKED = 6
"""Tokens that are fed and compared, in the first and in the last row."""


@functools.lru_cache(maxsize=1)
def model_of(config: MambaConfig, device: torch.device) -> MambaForCausalLM:
    """The model, drawn once for all cases. Ranks draw the same: their parts are alike, and norms must be."""
    tp = ranks() if device.type == "cuda" else TensorParallel(device=device)
    with skip_init():
        model = MambaForCausalLM(config, tp, dtype=torch.bfloat16, device=device)
    inputs.randomize_model(model, torch.Generator(device).manual_seed(1))
    return model


class Trace:
    """Sequences that a runner takes in and advances, their tokens given."""

    def __init__(self, model: MambaForCausalLM, batch: int, prompt: int, *, captured: bool) -> None:
        self.cache, on_gpu = model.new_cache(batch), model.device.type == "cuda"
        self.runner = Runner(
            model,
            self.cache,
            batch,
            batch * prompt,
            ladder=Ladder(batch, batch * prompt),
            capture=CudaCapture(model.device) if captured and on_gpu else None,
        )
        self.slots = [self.cache.allocate() for _ in range(batch)]
        self._device = model.device

    @torch.inference_mode()
    def prefill(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits ``[B, V]`` after prompts ``ids``, from their beginning."""
        self.requests = [Request(i, row, SamplingParams(), slot=self.slots[i]) for i, row in enumerate(ids)]
        chunks = [Chunk(request, 0, len(request.prompt)) for request in self.requests]
        return self.runner.forward(Schedule([], chunks, [])).clone()

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits ``[B, V]`` after one more token of each."""
        self.runner.give(torch.tensor(tokens, device=self._device))
        return self.runner.forward(Schedule(self.requests, [], [])).clone()


def logits_of(
    model: MambaForCausalLM, ids: Sequence[Sequence[int]], prompt: int, *, captured: bool
) -> torch.Tensor:
    """``[tokens behind the prompt, B, V]``: a prompt of ``prompt`` tokens, then a step for each further one."""
    trace = Trace(model, len(ids), prompt, captured=captured)
    found = [trace.prefill([row[:prompt] for row in ids])]
    found += [trace.decode([row[at] for row in ids]) for at in range(prompt, len(ids[0]))]
    return torch.stack(found)


def check(model: MambaForCausalLM, ids: Sequence[Sequence[int]], prompt: int) -> list[Error]:
    """Logits of captured steps: the prompt's, and those of steps that are run, captured and replayed."""
    found = logits_of(model, ids, prompt, captured=True)
    if model.tp.size > 1:
        return [compare("logits", found, logits_of(model, ids, prompt, captured=False).double())]
    errors = []
    for row in {0, len(ids) - 1}:
        ids_T = torch.tensor(ids[row], device=model.device)
        exact, rounded = (
            model_reference(model, ids_T, dtype)[prompt - 1 :] for dtype in (torch.float64, model.dtype)
        )
        errors.append(compare("logits", found[:, row], exact, rounded=rounded))
    return errors


def random_ids(generator: torch.Generator, config: MambaConfig, batch: int, length: int) -> list[list[int]]:
    """``batch`` rows of ids, the same on every rank."""
    return torch.randint(
        config.vocab_size, (batch, length), generator=generator, device=generator.device
    ).tolist()


def build_decode(
    generator: torch.Generator, *, batch: int, replay: bool, config: MambaConfig = MODEL
) -> Workload:
    """A token of each of ``batch`` sequences."""
    model = model_of(config, generator.device)
    ids = random_ids(generator, config, batch, PROMPT + CHECKED)

    def as_generate(samples: int) -> Samples:
        stamps = []
        with Engine(model, max_batch_size=batch, max_prefill_tokens=batch * PROMPT) as engine:
            params = SamplingParams(max_new_tokens=samples + WARM_UP, ignore_eos=True)
            for row in ids:
                engine.add_request(row[:PROMPT], params)
            while engine.has_work:
                engine.step()
                stamps.append(time.perf_counter())
        return Samples(tuple(b - a for a, b in pairwise(stamps[WARM_UP - 1 :])))

    def bare(samples: int) -> Samples:
        trace = Trace(model, batch, PROMPT, captured=True)
        trace.prefill([row[:PROMPT] for row in ids])
        for at in range(3):
            trace.decode([row[PROMPT + at] for row in ids])
        return replayed(torch.inference_mode()(trace.runner.repeat), samples, agree)

    return Workload(check=partial(check, model, ids, PROMPT), measure=bare if replay else as_generate)


def build_prefill(
    generator: torch.Generator, *, tokens: int, replay: bool, checked: int = 64, config: MambaConfig = MODEL
) -> Workload:
    """The first token behind a prompt of ``tokens``."""
    model = model_of(config, generator.device)
    (prompt,) = random_ids(generator, config, 1, tokens)

    def as_generate(samples: int) -> Samples:
        seconds = []
        with Engine(model, max_batch_size=1, max_prefill_tokens=tokens) as engine:
            for _ in range(samples + 3):
                began = time.perf_counter()
                engine.add_request(prompt, SamplingParams(max_new_tokens=1))
                while engine.has_work:
                    engine.step()
                seconds.append(time.perf_counter() - began)
        return Samples(tuple(seconds[3:]))

    def bare(samples: int) -> Samples:
        trace = Trace(model, 1, tokens, captured=True)
        for _ in range(3):
            trace.prefill([prompt])
        return replayed(torch.inference_mode()(trace.runner.repeat), samples, agree)

    return Workload(
        # The beginning of it: a reference takes a token at a time.
        check=partial(check, model, [prompt[:checked]], min(tokens, checked) - CHECKED),
        measure=bare if replay else as_generate,
    )


def step_bytes(batch: int, gpus: int) -> int:
    """What a decode step moves on one GPU: parameters and states of all layers, and the head."""
    return LAYERS * moved_bytes(batch, CHANNELS // gpus) + 2 * VOCABULARY * HIDDEN // gpus


def cases(goals: Mapping[tuple[str, int, int], Target]) -> list[Case]:
    """All cases, held to ``goals`` as a user gets them."""
    made = []
    for gpus in (1, 2):
        where = "one GPU" if gpus == 1 else "two GPUs"
        for batch in (1, 32, 128):
            for form in ("as generate", "replay"):
                made.append(
                    Case(
                        name=f"decode, batch {batch}, {where}, {form}",
                        unit="ms",
                        sizes={"batch": batch, "GPUs": gpus, "form": form},
                        build=partial(build_decode, batch=batch, replay=form == "replay"),
                        limit=limits.by_bytes_of_a_step(step_bytes(batch, gpus)),
                        target=_goal(goals, form, ("decode", batch, gpus)),
                        work=(batch, "tokens"),
                    )
                )
        for tokens in (512, 2048, 8192):
            for form in ("as generate", "replay") if tokens <= MAX_TOKENS else ("as generate",):
                made.append(
                    Case(
                        name=f"prefill 1 x {tokens}, {where}, {form}",
                        unit="ms",
                        sizes={"length": tokens, "GPUs": gpus, "form": form},
                        build=partial(build_prefill, tokens=tokens, replay=form == "replay"),
                        limit=limits.by_flops(LAYERS * flops(tokens, CHANNELS // gpus)),
                        target=_goal(goals, form, ("prefill", tokens, gpus)),
                        work=(tokens, "tokens"),
                    )
                )
    return made


def _goal(goals: Mapping[tuple[str, int, int], Target], form: str, sizes: tuple[str, int, int]) -> Target:
    return goals.get(sizes, Target()) if form == "as generate" else Target()


CASES = cases(WHOLE)


def main(argv: Sequence[str] | None = None) -> int:
    """As :func:`benchmarks.runner.main`, on every rank that torchrun started; rank 0 tells."""
    options = runner.parser("whole", __doc__, CASES, 40).parse_args(argv)
    if not runner.has_gpu("whole"):
        return 2
    on_h200 = torch.cuda.get_device_name(ranks().device) == H200.hardware
    mine = [case for case in cases(WHOLE_ON_H200 if on_h200 else WHOLE) if case.sizes["GPUs"] == ranks().size]
    return over_ranks.run("whole", mine, options, goals=H200.hardware if on_h200 else "NVIDIA H100 80GB HBM3")


if __name__ == "__main__":
    sys.exit(main())
