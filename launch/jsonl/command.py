"""``tp-mamba generate --prompts FILE --output FILE``."""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.leader import Leader, follow
from tp_mamba.launch.console import print_json, tell, write
from tp_mamba.launch.jsonl.arguments import examine_files
from tp_mamba.launch.jsonl.progress import requests_bar
from tp_mamba.launch.jsonl.results import Found, ResultsFile
from tp_mamba.launch.jsonl.run import Counts, FileRun
from tp_mamba.launch.loading import cache_config_of, describe, limits_before_loading, load_encoder, load_model
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.quoting import shown_path


def run_file(args: argparse.Namespace, tp: TensorParallel) -> int:
    """Continue the requests of a file on every rank; the arguments are known to agree.

    Raises:
        ValueError: the files, the checkpoint or the settings do not fit.
        RuntimeError: some requests have failed; all have their results.
        OSError: a file cannot be read or written.
        RankFailedError: another rank has failed.
    """
    found = args.found
    if found is None:  # torchrun's ranks: the first has the files
        with tp.agreed():
            found = examine_files(args) if tp.rank == 0 else Found()
    encoder, tokenizer = load_encoder(args, tp)
    limits = limits_before_loading(args, tp)
    model, weights = load_model(args, tp)
    report = describe(model)
    engine = Engine(model, tokenizer, eager=args.eager, cache_config=cache_config_of(args), **limits)
    if tp.rank > 0:
        follow(engine, tp)
        return 0
    began = time.perf_counter()
    with Leader(engine, tp) as leader:
        run = FileRun(
            leader,
            encoder,
            args.params,
            _settings(args, weights, tokenizer),
            vocab_size=model.config.vocab_size,
            note=lambda sentence: tell(args.verb, "note", sentence),
            text_only=args.chat,
        )
        counts = _continue(args, run, found)
    report["reused_prompt_tokens"] = engine.reused_tokens
    _tell(args, report, found, counts, time.perf_counter() - began)
    return 0


def _continue(args: argparse.Namespace, run: FileRun, found: Found) -> Counts:
    requests, output = Path(args.prompts), Path(args.output)
    if found.settings not in (None, run.settings):
        raise ValueError(
            f"--output {shown_path(output)} was made with another checkpoint, dtype or other sampling options: give "
            "the same ones, or --overwrite to begin anew"
        )
    results = ResultsFile(output, found, fresh=not (args.resume or args.overwrite))
    try:
        with requests_bar(requests) as progress:
            return run(requests, results, found, progress)
    finally:
        results.close()


def _settings(args: argparse.Namespace, weights: str, tokenizer: Tokenizer) -> str:
    """A digest of what all results depend on besides their lines; not the number of ranks, nor the batch."""
    given = (args.params, args.chat, weights, hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]


def _tell(
    args: argparse.Namespace, report: dict[str, Any], found: Found, counts: Counts, seconds: float
) -> None:
    """Say what was done.

    Raises:
        RuntimeError: requests have failed.
    """
    if args.json:
        first = counts.first_failure
        print_json(
            {
                "output": args.output,
                "results": counts.lines,
                "resumed_after": found.lines,
                "failed": counts.failed,
                "first_failure": None if first is None else {"line": first[0], "error": first[1]},
                **report,
                "prompt_tokens": counts.prompt_tokens,
                "new_tokens": counts.new_tokens,
                "seconds": seconds,
                "tokens_per_second": counts.new_tokens / seconds,
            }
        )
    else:
        reused = report["reused_prompt_tokens"]
        kept = f"{reused:,} prompt tokens from kept states, " if reused else ""
        earlier = f" ({found.lines:,} of them by an earlier run)" if found.lines else ""
        write(
            f"wrote {shown_path(args.output)}: {counts.lines:,} results{earlier}, {counts.new_tokens:,} new tokens, "
            f"{kept}{seconds:.1f} s, {counts.new_tokens / seconds:,.1f} tokens/s\n"
        )
    if counts.first_failure is not None:
        number, error = counts.first_failure
        raise RuntimeError(
            f"{counts.failed:,} of {counts.lines:,} requests failed, the first of them line {number}: {error}"
        )
