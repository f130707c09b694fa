"""Wrong usage: status 2 and one reason, at once. Nothing here may import torch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch.arguments import sampling

PROMPT = ["generate", "x", "--prompt", "a"]
WRONG = [
    ([], "arguments are required: VERB"),
    (["translate"], "invalid choice: 'translate'"),
    (["generate"], "arguments are required: CHECKPOINT"),
    (["generate", "x", "--tp", "0"], "got '0', expected a number of ranks from 1 to 256, or \"auto\""),
    (["generate", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    ([*PROMPT, "--max-new-tokens", "-1"], "max_new_tokens=-1 makes nothing: ask for at least 1"),
    (["verify", "x", "--tp", "1,two"], "expected numbers of ranks from 1 to 256 divided by commas"),
    (["plan", "x", "--tp", "auto"], "got 'auto', expected a whole number of at least 1"),
    (["shard", "x", "y"], "arguments are required: --tp"),
    (["merge", "x"], "arguments are required: OUT"),
    ([*PROMPT, "--seed", "-1"], "seed=-1 is out of range"),
    ([*PROMPT, "--seed", "1.5"], "got '1.5', expected a whole number"),
    ([*PROMPT, "--seed", str(2**64)], "is out of range"),
    ([*PROMPT, "--temperature", "nan"], "temperature=nan is out of range"),
    ([*PROMPT, "--temperature", "-1"], "temperature=-1.0 is out of range"),
    ([*PROMPT, "--temperature", "warm"], "got 'warm', expected a number"),
    ([*PROMPT, "--top-p", "0"], "top_p=0.0 is out of range"),
    ([*PROMPT, "--top-p", "2"], "top_p=2.0 is out of range"),
    ([*PROMPT, "--top-k", "-1"], "top_k=-1 is negative"),
    ([*PROMPT, "--min-p", "inf"], "min_p=inf is out of range"),
    ([*PROMPT, "--repetition-penalty", "0"], "repetition_penalty=0.0 is out of range"),
    ([*PROMPT, "--stop", ""], "stop holds an empty string"),
    ([*PROMPT, "--stop-token-id", "one"], "got 'one', expected a whole number"),
    ([*PROMPT, "--tp", "1000"], "got '1000', expected a number of ranks from 1 to 256"),
    (["verify", "x", "--tp", "1,1000"], "expected numbers of ranks from 1 to 256"),
    ([*PROMPT, "--device", "cpu", "--backend", "nccl"], "--device cpu with --backend nccl"),
    (["verify", "x", "--device", "cpu", "--backend", "nccl"], "--device cpu with --backend nccl"),
    (["generate", "x"], "no prompt was given: pass --prompt TEXT, --prompt-file FILE, or --prompt - for"),
    (["generate", "x", "--prompt", "-", "--prompt", "-"], "--prompt - was given 2 times: standard input"),
    (["generate", "x", "--prompts", "a"], "--prompts was given without --output: name the file that takes"),
    (["generate", "x", "--prompts", "a", "--prompt", "b"], "--prompts FILE was given beside another prompt"),
    (
        [*PROMPT, "--output", "a"],
        "--output was given without --prompts FILE: it is about the results of such",
    ),
    ([*PROMPT, "--resume"], "--resume was given without --prompts FILE"),
    (["generate", "x", "--prompts", "a", "--resume", "--overwrite"], "not allowed with argument --resume"),
    ([*PROMPT, "--mamba-block-size", "64"], "--mamba-block-size was given without --enable-prefix-caching"),
    ([*PROMPT, "--memory-fraction", "0"], "got '0', expected a number above 0 and at most 1, as in 0.8"),
    ([*PROMPT, "--memory-fraction", "90%"], "got '90%', expected a number"),
    ([*PROMPT, "--max-prefill-tokens", "0"], "got '0', expected a whole number of at least 1"),
    (["verify", "x", "--tokens", "4", "--prompt", "a"], "both --tokens and --prompt were given: choose"),
    (["verify", "x", "--tokens", "0"], "got '0', expected a whole number of at least 1"),
    (["verify", "x", "--tokenizer", "x"], "--tokenizer was given without --prompt: random token ids need"),
    (["verify", "x", "--tolerance", "nan"], "got 'nan', expected a finite number of at least 0"),
    (["info", "x", "--\x1b[31m"], r"unrecognized arguments: --\x1b[31m"),
]

PROGRAM = """
import contextlib, io, json, sys
from tp_mamba.launch import cli

class NoTorch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise AssertionError("torch is imported")

sys.meta_path.insert(0, NoTorch)
found = []
for argv in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            status = cli.main(argv)
        except SystemExit as left:
            status = left.code
    found.append((status, err.getvalue()))
print(json.dumps(found))
"""


def test_every_wrong_usage() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        input=json.dumps([argv for argv, _ in WRONG]),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    for (argv, told), (status, err) in zip(WRONG, json.loads(done.stdout), strict=True):
        assert status == 2, (argv, err)
        assert told in err.splitlines()[-1], (argv, err)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_limits_are_those_of_sampling_params(field: str) -> None:
    for value in ("0", "1e-7", "1e-6", "0.5", "1", "1.0001", "2"):
        assert outcome(sampling(field, float), value) == outcome(
            lambda text: getattr(SamplingParams(**{field: float(text)}), field), value
        )


def outcome(parse: Callable[[str], float], text: str) -> float | str:
    """What becomes of an argument: its value, or why it is refused."""
    try:
        return parse(text)
    except (ValueError, argparse.ArgumentTypeError) as refused:
        return str(refused)
