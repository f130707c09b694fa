"""Requests as they arrive at a server: throughput, time to the first token and per token, at p50 and p99.

Requests of mixed lengths reach rank 0, all at once or at the times of a Poisson process, and an engine over one rank or
several continues them (:class:`tp_mamba.engine.leader.Leader`). Weights are random. A time counts from a request's
arrival to the host's knowledge of its tokens. Before anything is timed the same requests are served, which
compiles and captures, and some of them again one at a time: how many of their tokens are the same is shown. In float32
all must be; in 16 bits a product may round by the number of its rows, and two random logits lie close.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT
from benchmarks.environment import describe
from benchmarks.inputs import OUT_PROJ_SHARE, decay_rates, normal, time_step_bias
from benchmarks.served import Served, rows_of
from benchmarks.steps import StepClock, table_of
from tp_mamba.config import MambaConfig
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.leader import Leader, follow
from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch.console import show, table
from tp_mamba.launch.ranks.start import make_tensor_parallel, start_ranks
from tp_mamba.layers.init import skip_init
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

MODELS = {
    "falcon-mamba-7b": {
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 64,
        "vocab_size": 65_024,
    },
    "mamba-130m": {
        "hidden_size": 768,
        "intermediate_size": 1536,
        "num_hidden_layers": 24,
        "vocab_size": 50_280,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
}
"""Shapes under the names of what has them; all are built as FalconMamba."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the trace."""

    arrival: float
    """Seconds after the beginning."""
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    case: str
    requests: int
    new_tokens: int
    seconds: float
    tokens_per_second: float
    first_token_ms: tuple[float, float]
    """p50 and p99."""
    per_token_ms: tuple[float, float]
    """Of each request's mean time between its tokens."""
    gap_ms: tuple[float, float]
    """Between any two tokens of a request."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Where the time went (:class:`benchmarks.steps.StepClock`), on rank 0."""


def make_trace(options: argparse.Namespace, rate: float, vocab_size: int) -> list[Request]:
    """Requests at ``rate`` per second, all at once for 0; prompt lengths are spread evenly over their logarithms."""
    rng = np.random.default_rng(options.seed)
    low, high = options.prompt_tokens
    lengths = np.exp(rng.uniform(np.log(low), np.log(high + 1), options.requests)).astype(int).clip(low, high)
    gaps = rng.exponential(1 / rate, options.requests) if rate else np.zeros(options.requests)
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    return [
        Request(float(arrival), prompt, options.new_tokens)
        for arrival, prompt in zip(np.cumsum(gaps), prompts, strict=True)
    ]


def serve(leader: Leader | Engine, trace: list[Request]) -> list[Served]:
    """Give ``leader`` each request when it arrives, and wait for all."""
    served = [Served(request.arrival) for request in trace]
    order, began, at = {}, time.perf_counter(), 0
    while at < len(trace) or leader.has_work:
        now = time.perf_counter() - began
        while at < len(trace) and trace[at].arrival <= now:
            params = SamplingParams(max_new_tokens=trace[at].new_tokens, ignore_eos=True)
            order[leader.add_request(trace[at].prompt, params)] = served[at]
            at += 1
        if not leader.has_work:
            time.sleep(max(0.0, trace[at].arrival - (time.perf_counter() - began)))
            continue
        events = leader.step()
        now = time.perf_counter() - began
        for event in events:
            if event.token_id is None:
                raise RuntimeError(f"request {event.index} failed: {event.error}")
            order[event.index].times.append(now)
            order[event.index].token_ids.append(event.token_id)
    return served


def summarize(case: str, served: list[Served], steps: Sequence[dict[str, Any]] = ()) -> Result:
    """The figures of one run."""

    def percentiles(seconds: list[float]) -> tuple[float, float]:
        p50, p99 = np.percentile(seconds or [0.0], [50, 99])
        return 1e3 * float(p50), 1e3 * float(p99)

    tokens = sum(len(each.token_ids) for each in served)
    seconds = max(each.times[-1] for each in served)
    several = [each for each in served if len(each.times) > 1]
    return Result(
        case,
        len(served),
        tokens,
        seconds,
        tokens / seconds,
        percentiles([each.first_token for each in served]),
        percentiles([each.per_token for each in several]),
        percentiles([gap for each in several for gap in np.diff(each.times).tolist()]),
        list(steps),
    )


def same_alone(leader: Leader, trace: list[Request], served: list[Served], count: int) -> tuple[int, int]:
    """Of ``count`` requests that are served again one at a time: tokens that are the same, and all tokens.

    Tokens behind the first that differs continue another text, and are not counted as the same.
    """
    same = total = 0
    for request, before in list(zip(trace, served, strict=True))[:count]:
        (alone,) = serve(leader, [Request(0.0, request.prompt, request.new_tokens)])
        differ = [a != b for a, b in zip(alone.token_ids, before.token_ids, strict=True)]
        same += differ.index(True) if True in differ else len(differ)
        total += len(differ)
    return same, total


def randomize(model: MambaForCausalLM, generator: torch.Generator) -> None:
    """Draw every parameter of this rank's part anew, those that all ranks hold whole alike."""
    for name, p in model.named_parameters():
        if name.endswith(".A"):
            value = decay_rates(generator, *p.shape)
        elif name.endswith("dt_proj.bias"):
            value = time_step_bias(generator, len(p))
        elif name.endswith(".D") or "norm" in name:
            value = normal(generator, *p.shape, mean=1.0, std=0.3, dtype=torch.float32)
        else:
            std = 1.0 if "embeddings" in name else 1.2 * p.shape[-1] ** -0.5
            std *= OUT_PROJ_SHARE if "out_proj" in name else 1
            value = normal(generator, *p.shape, std=std, dtype=p.dtype)
        p.copy_(value)


def model_of(options: argparse.Namespace, tp: TensorParallel) -> MambaForCausalLM:
    """This rank's part of the model that ``options`` name, drawn at random."""
    config = MambaConfig(
        model_type="falcon_mamba",
        state_size=16,
        conv_kernel=4,
        time_step_rank=MODELS[options.model]["hidden_size"] // 16,
        tie_word_embeddings=False,
        mixer_norm="weightless",
        **MODELS[options.model],  # type: ignore[arg-type]
    )
    with skip_init():
        model = MambaForCausalLM(config, tp, getattr(torch, options.dtype), tp.device)
    randomize(model, torch.Generator(tp.device).manual_seed(options.seed))
    return model


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """What the benchmarks of requests take alike."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--model", choices=MODELS, default="falcon-mamba-7b", help="whose shapes (default %(default)s)"
    )
    made.add_argument("--tp", type=int, default=1, metavar="N", help="ranks (default %(default)s)")
    made.add_argument("--device", choices=("cpu", "cuda"), help="by default GPUs, if there are any")
    made.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--commit", help="of the code, where there is no git")
    made.add_argument("--json", type=Path, metavar="FILE", help="keep the results here")
    return made


def header(name: str, options: argparse.Namespace, tp: TensorParallel) -> dict[str, Any]:
    """The beginning of a recorded result: what ran, where and how."""
    return {
        "benchmark": name,
        "environment": describe(tp.device, options.commit),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "commit")},
        "ranks": tp.size,
    }


def on_ranks(run: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> Any:
    """The result of rank 0 of ``run`` on each rank asked for; a single one is this process."""
    if options.tp == 1:
        return run(options)
    sys.path.append(str(ROOT))  # where the ranks, new processes, find the benchmark's module
    return start_ranks(run, options, size=options.tp)


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """One rank; the results on rank 0."""
    tp = make_tensor_parallel(options.device, None)
    model = model_of(options, tp)
    engine = Engine(
        model,
        max_batch_size=options.max_batch_size,
        max_prefill_tokens=options.max_prefill_tokens,
        gather_logits=not options.cut_logits,
    )
    if tp.rank > 0:
        follow(engine, tp)
        return None
    found: dict[str, Any] = {
        **header("trace", options, tp),
        "results": [],
        "rows": [],
    }
    with Leader(engine, tp) as leader:
        at_once = make_trace(options, 0.0, model.config.vocab_size)
        for _ in range(options.warm_ups):
            served = serve(leader, at_once)
        found["slots"] = leader.max_batch_size
        found["same_as_alone"] = same_alone(leader, at_once, served, options.check)
        found["prompt_lengths"] = [len(request.prompt) for request in at_once]
        clock = StepClock(engine)
        for rate in options.rates:
            trace = make_trace(options, rate, model.config.vocab_size)
            if rate:  # its steps are others than those of all at once
                serve(leader, trace)
                clock.read()
            name = f"{rate:g} requests/s" if rate else "all at once"
            served = serve(leader, trace)
            result = summarize(name, served, clock.read())
            found["results"].append(asdict(result))
            found["rows"] += [
                row.to_json()
                for row in rows_of(f"{len(trace)} requests, {name}", served, result.seconds, tp.size)
            ]
            found["peak_bytes"] = (
                torch.cuda.max_memory_allocated(tp.device) if tp.device.type == "cuda" else None
            )
            print(f"  {name}: {result.tokens_per_second:,.0f} tokens/s", file=sys.stderr, flush=True)
            if options.json is not None:  # what is cut short has kept what it found
                options.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line("trace", __doc__)
    made.add_argument("--requests", type=int, default=64, metavar="N")
    made.add_argument("--prompt-tokens", type=int, nargs=2, default=(17, 2000), metavar=("LEAST", "MOST"))
    made.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each request")
    made.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=(0.0, 8.0, 16.0),
        metavar="X",
        help="requests per second; 0: at once",
    )
    made.add_argument(
        "--max-batch-size", type=int, default=32, metavar="N", help="slots (default %(default)s)"
    )
    made.add_argument("--max-prefill-tokens", type=int, default=8192, metavar="N")
    made.add_argument(
        "--cut-logits",
        action="store_true",
        help="choose tokens over a vocabulary that stays cut over the ranks",
    )
    made.add_argument(
        "--warm-ups", type=int, default=2, metavar="N", help="times that all are served beforehand"
    )
    made.add_argument(
        "--check", type=int, default=4, metavar="N", help="requests that are served again alone"
    )
    return made


def needs_gpu(name: str, options: argparse.Namespace) -> bool:
    """Whether the model is too large for what there is; says so."""
    if options.device == "cpu" or torch.cuda.is_available() or options.model != "falcon-mamba-7b":
        return False
    print(
        f"python -m benchmarks.{name} needs an NVIDIA GPU for falcon-mamba-7b, and torch finds none here: run it on "
        "a machine that has one, or with --model tiny --dtype float32.",
        file=sys.stderr,
    )
    return True


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 if in float32 a request alone has other tokens."""
    made = parser()
    options = made.parse_args(argv)
    low, high = options.prompt_tokens
    if min(options.requests, low, options.new_tokens, options.warm_ups, options.tp) < 1 or low > high:
        made.error(
            "requests, tokens, ranks and warm-ups are at least 1, and the least prompt is no longer than the most"
        )
    if min(options.rates) < 0:
        made.error("a rate is 0, for all at once, or requests per second")
    if needs_gpu("trace", options):
        return 2
    found = on_ranks(run, options)
    _show(found)
    same, total = found["same_as_alone"]
    return int(options.dtype == "float32" and same < total)


def _show(found: dict[str, Any]) -> None:
    environment, options = found["environment"], found["options"]
    same, total = found["same_as_alone"]
    peak = "" if found["peak_bytes"] is None else f", peak {found['peak_bytes'] / 2**30:.2f} GiB on rank 0"
    low, high = options["prompt_tokens"]
    show(
        f"trace: {found['ranks']} x {environment['hardware']}, torch {environment['torch']}, commit "
        f"{(environment['commit'] or 'unknown')[:12]}, {environment['date']}",
        f"{options['model']} in {options['dtype']}, prompts of {low} to {high} tokens, {options['new_tokens']} new "
        f"each, {found['slots']} slots; {same} of {total} tokens as alone{peak}",
        to_stdout=True,
    )
    rows = []
    for result in found["results"]:
        times = [
            f"{value:,.1f}" for name in ("first_token_ms", "per_token_ms", "gap_ms") for value in result[name]
        ]
        rows.append((result["case"], result["requests"], f"{result['tokens_per_second']:,.0f}", *times))
    columns = (
        "arrivals",
        "requests",
        "new tokens/s",
        "first token p50",
        "p99",
        "per token p50",
        "p99",
        "gap p50",
        "p99",
    )
    show(table(columns, rows), "times in ms", to_stdout=True)
    for result in found["results"]:
        show(f"{result['case']}:", table(*table_of(result["steps"])), to_stdout=True)


if __name__ == "__main__":
    sys.exit(main())
