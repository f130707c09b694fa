"""Prompts that begin alike, with states kept for them and without: tokens computed, first token, throughput.

Two kinds of work. Shared: requests that arrive together, whose prompts share their first 4,096 tokens, as behind one
long instruction. Conversation: ten turns, each of which sends all that was said before. Weights are random.

First of all, prompts are served alone that find a kept state, and again with nothing kept. Where the beginnings are
multiples of the block size both are computed in the same pieces, so logits must be equal bit for bit, in any dtype; a
difference is a failure, and nothing is timed. Then the texts of the timed runs are compared. There prompts are
cut elsewhere than without kept states, which no kernel of ours tells, but products of a library may round by the
number of rows: in 16 bits a few texts part, in float32 none should.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.report import Row
from benchmarks.served import Served, rows_of
from benchmarks.trace import (
    Request,
    command_line,
    header,
    model_of,
    needs_gpu,
    on_ranks,
    serve,
    summarize,
)
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.scheduler import Schedule
from tp_mamba.launch.console import show, table
from tp_mamba.launch.ranks.start import make_tensor_parallel
from tp_mamba.model import MambaForCausalLM
from tp_mamba.options import CacheConfig
from tp_mamba.state.prefix import WORTHWHILE


@dataclass(slots=True)
class Run:
    """One kind of work, done once."""

    served: list[Served] = field(default_factory=list)
    seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    case: str
    kept: bool
    """Whether states were kept."""
    prompt_tokens: int
    computed_tokens: int
    """Of those; states that were kept stood for the others."""
    seconds: float
    tokens_per_second: float
    """New ones."""
    first_token_ms: tuple[float, float]
    """p50 and p99."""
    same_texts: tuple[int, int]
    """Tokens that are the same as without kept states, and all."""


def new_engine(model: MambaForCausalLM, options: argparse.Namespace, *, keep: bool) -> Engine:
    return Engine(
        model,
        max_batch_size=options.max_batch_size,
        max_prefill_tokens=options.max_prefill_tokens,
        cache_config=CacheConfig(enable_prefix_caching=keep, mamba_block_size=options.block_size),
    )


def ids(rng: np.random.Generator, vocab_size: int, count: int) -> list[int]:
    return rng.integers(0, vocab_size, count).tolist()


def shared_prompts(options: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """Prompts that share a beginning, each with an end of its own."""
    rng = np.random.default_rng(options.seed)
    beginning = ids(rng, vocab_size, options.shared_tokens)
    return [beginning + ids(rng, vocab_size, options.own_tokens) for _ in range(options.requests)]


def serve_shared(engine: Engine, options: argparse.Namespace, vocab_size: int) -> Run:
    """All of them at once."""
    prompts = shared_prompts(options, vocab_size)
    return _add(Run(), engine, [Request(0.0, prompt, options.new_tokens) for prompt in prompts])


def converse(engine: Engine, options: argparse.Namespace, vocab_size: int) -> Run:
    """Turn after turn: what the user says, and what the model answers."""
    rng, run, said = np.random.default_rng(options.seed + 1), Run(), list[int]()
    for _ in range(options.turns):
        said += ids(rng, vocab_size, options.turn_tokens)
        _add(run, engine, [Request(0.0, list(said), options.new_tokens)])
        said += run.served[-1].token_ids
    return run


def _add(run: Run, engine: Engine, requests: list[Request]) -> Run:
    """Serve ``requests``, and count them to ``run``."""
    before = engine.reused_tokens
    served = serve(engine, requests)
    run.served += served
    run.seconds += max(each.times[-1] for each in served)
    run.prompt_tokens += sum(len(request.prompt) for request in requests)
    run.reused_tokens += engine.reused_tokens - before
    return run


WORK = {"shared": serve_shared, "conversation": converse}


def differing_logits(engine: Engine, options: argparse.Namespace, vocab_size: int) -> list[str]:
    """Prompts whose logits with a kept state are not those with nothing kept, to the bit; and those without a hit."""
    engine.start()
    assert engine.prefixes is not None
    assert engine._steps is not None
    runner, seen = engine._steps._runner, list[torch.Tensor]()
    forward = runner.forward

    def listening(schedule: Schedule) -> torch.Tensor:
        logits = forward(schedule)
        seen.append(logits.clone())
        return logits

    def logits_of(prompt: list[int]) -> torch.Tensor:
        seen.clear()
        engine.add_request(prompt, SamplingParams(max_new_tokens=4, ignore_eos=True))
        while engine.has_work:
            engine.step()
        return torch.cat(seen)

    wrong = []
    first, *others = shared_prompts(options, vocab_size)[: options.check + 1]
    runner.forward = listening  # type: ignore[method-assign]
    for number, prompt in enumerate(others, 1):
        # The first two times a step runs eagerly or is captured, which gives the same bits; later ones are replays.
        engine.prefixes.clear()
        miss = logits_of(prompt)
        engine.prefixes.clear()
        logits_of(first)
        before = engine.reused_tokens
        hit = logits_of(prompt)
        if engine.reused_tokens - before != options.shared_tokens:
            wrong.append(f"prompt {number} found {engine.reused_tokens - before} tokens kept")
        elif not torch.equal(miss, hit):
            wrong.append(f"prompt {number} is off by {(miss - hit).abs().max():.1e}")
    runner.forward = forward  # type: ignore[method-assign]
    engine.prefixes.clear()
    return wrong


def same_tokens(one: Sequence[Served], other: Sequence[Served]) -> tuple[int, int]:
    """Tokens of ``one`` up to the first of each text that differs from ``other``'s, and all tokens."""
    same = total = 0
    for a, b in zip(one, other, strict=True):
        differ = [x != y for x, y in zip(a.token_ids, b.token_ids, strict=True)]
        same += differ.index(True) if True in differ else len(differ)
        total += len(differ)
    return same, total


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """One rank: all of them make the same calls."""
    tp = make_tensor_parallel(options.device, None)
    model = model_of(options, tp)
    vocab_size, results, rows = model.config.vocab_size, list[Result](), list[Row]()
    wrong = list[str]()
    plain: dict[str, Run] = {}
    for keep in (False, True):
        with new_engine(model, options, keep=keep) as engine:
            if keep:
                wrong = [
                    text
                    for texts in tp.all_gather_object(differing_logits(engine, options, vocab_size))
                    for text in texts
                ]
                if wrong:
                    break
            for case, work in WORK.items():
                for _ in range(options.warm_ups):  # compiles and captures
                    work(engine, options, vocab_size)
                    if engine.prefixes is not None:
                        engine.prefixes.clear()
                done = work(engine, options, vocab_size)
                plain.setdefault(case, done)
                name = f"{case}, states {'kept' if keep else 'not kept'}"
                rows += rows_of(name, done.served, done.seconds, tp.size)
                figures = summarize(case, done.served)
                results.append(
                    Result(
                        case,
                        keep,
                        done.prompt_tokens,
                        done.prompt_tokens - done.reused_tokens,
                        done.seconds,
                        figures.new_tokens / done.seconds,
                        figures.first_token_ms,
                        same_tokens(plain[case].served, done.served),
                    )
                )
                if tp.rank == 0:
                    print(
                        f"  {case}, {'kept' if keep else 'none kept'}: {done.seconds:.2f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    return {
        **header("prefix", options, tp),
        "not_bit_equal": wrong,
        "results": [asdict(result) for result in results],
        "rows": [row.to_json() for row in rows],
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line("prefix", __doc__)
    sizes = {
        "requests": (64, "that share a beginning"),
        "shared-tokens": (4096, "of that beginning, a multiple of the block size"),
        "own-tokens": (64, "of each prompt behind it"),
        "turns": (10, "of the conversation"),
        "turn-tokens": (256, "that the user adds in each"),
        "new-tokens": (64, "of each answer"),
        "max-batch-size": (32, "slots"),
        "max-prefill-tokens": (8192, "prompt tokens of a step"),
        "block-size": (2048, "tokens between two kept states"),
        "warm-ups": (1, "times that all is done beforehand"),
        "check": (2, "prompts whose logits are compared"),
    }
    for name, (value, text) in sizes.items():
        made.add_argument(
            f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default %(default)s)"
        )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 if a kept state gave other bits, or in float32 other texts."""
    made = parser()
    options = made.parse_args(argv)
    numbers = [value for name, value in vars(options).items() if isinstance(value, int) and name != "seed"]
    if min(numbers) < 1 or options.requests <= options.check or options.shared_tokens % options.block_size:
        made.error(
            "all numbers are at least 1, there are more requests than are checked, and the shared tokens are a "
            "multiple of the block size"
        )
    if options.own_tokens < WORTHWHILE:
        made.error(
            f"--own-tokens {options.own_tokens} is too few to keep the state before them: give {WORTHWHILE}"
        )
    if needs_gpu("prefix", options):
        return 2
    found = on_ranks(run, options)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
    if found["not_bit_equal"]:
        print("a kept state gave other bits: " + "; ".join(found["not_bit_equal"]), file=sys.stderr)
        return 1
    _show(found)
    differ = any(result["same_texts"][0] < result["same_texts"][1] for result in found["results"])
    return int(options.dtype == "float32" and differ)


def _show(found: dict[str, Any]) -> None:
    environment, options = found["environment"], found["options"]
    show(
        f"prefix: {found['ranks']} x {environment['hardware']}, torch {environment['torch']}, commit "
        f"{(environment['commit'] or 'unknown')[:12]}, {environment['date']}",
        f"{options['model']} in {options['dtype']}; {options['requests']} requests that share "
        f"{options['shared_tokens']} tokens, with {options['own_tokens']} of their own; {options['turns']} turns of "
        f"{options['turn_tokens']} tokens; {options['new_tokens']} new each; logits behind kept states equal to the "
        "bit",
        to_stdout=True,
    )
    columns = (
        "work", "states", "prompt tokens", "computed", "seconds", "new tokens/s", "first token p50, ms", "p99",
        "same texts",
    )  # fmt: skip
    rows = [
        (
            result["case"],
            "kept" if result["kept"] else "none kept",
            f"{result['prompt_tokens']:,}",
            f"{result['computed_tokens']:,}",
            f"{result['seconds']:.2f}",
            f"{result['tokens_per_second']:,.0f}",
            *(f"{value:,.1f}" for value in result["first_token_ms"]),
            "{} of {}".format(*result["same_texts"]),
        )
        for result in found["results"]
    ]
    show(table(columns, rows), to_stdout=True)


if __name__ == "__main__":
    sys.exit(main())
