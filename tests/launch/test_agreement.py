"""Ranks of several hosts that were told different things: one sentence on every rank, before the first step."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_mamba.checkpoint.shards import shard_checkpoint
from tp_mamba.launch.agreement import agree_on_arguments, agree_on_weights
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

NODE = """
import os, sys
from tp_mamba.launch import cli
sys.exit(cli.main([*sys.argv[1:], "--seed", os.environ["RANK"]]))
"""


def test_the_command_of_two_nodes_with_other_seeds(sample: Path, tmp_path: Path) -> None:
    script = tmp_path / "node.py"
    script.write_text(NODE)
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), "generate", str(sample), "--prompt", "The", "--device", "cpu"],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tp-mamba ")]
    assert (
        "--seed differs between the ranks, rank 0 was given 0 and rank 1 1: give every rank the same" in line
    )


def told(tp: TensorParallel, folders: list[str], given: list[dict[str, object]]) -> str | None:
    """The sentence that a rank ends with which was given its own folder and arguments; None if all agree."""
    args = argparse.Namespace(checkpoint=folders[tp.rank], **given[tp.rank])
    try:
        agree_on_arguments(tp, args, given[0])
        agree_on_weights(tp, MambaForCausalLM.from_pretrained(args.checkpoint, tp=tp, device="cpu"))
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture
def other(sample: Path, tmp_path: Path) -> Path:
    """A copy of the sample, to be changed."""
    return Path(shutil.copytree(sample, tmp_path / "other"))


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (
            {"max_new_tokens": 3},
            {"max_new_tokens": 30},
            "--max-new-tokens differs between the ranks, rank 0",
        ),
        (
            {"dtype": None},
            {"dtype": "bfloat16"},
            "--dtype differs between the ranks, rank 0 was given None and",
        ),
        ({"seed": 1, "chat": False}, {"seed": 1, "chat": False}, None),
    ],
)
def test_arguments(first: dict, second: dict, sentence: str | None, sample: Path, ranks) -> None:
    check(ranks(2).run(told, [str(sample)] * 2, [first, second]), sentence)


def test_another_config(sample: Path, other: Path, ranks) -> None:
    text = (other / "config.json").read_text()
    assert '"layer_norm_epsilon": 1e-05' in text
    (other / "config.json").write_text(text.replace("1e-05", "1e-06"))
    sentence = "config.json of the checkpoint differs between the ranks"
    check(ranks(2).run(told, [str(sample), str(other)], [{}, {}]), sentence)


def test_other_weights(sample: Path, other: Path, ranks) -> None:
    check(ranks(2).run(told, [str(sample), str(other)], [{}, {}]), None)  # what they are called is no matter
    for file in other.glob("*.safetensors"):
        save_file({name: tensor + torch.ones(()) for name, tensor in load_file(file).items()}, file)
    sentence = "the content of the checkpoint differs between the ranks"
    check(ranks(2).run(told, [str(sample), str(other)], [{}, {}]), sentence)


def test_files_of_two_runs_of_shard(sample: Path, tmp_path: Path, ranks) -> None:
    """Of the same weights here, of others in a mistake: a rank reads its own file alone, and norms can be alike."""
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for folder in folders:
        shard_checkpoint(sample, folder, 2)
    check(ranks(2).run(told, [folders[0]] * 2, [{}, {}]), None)
    sentence = "the run of tp-mamba shard that wrote the checkpoint differs between the ranks"
    check(ranks(2).run(told, folders, [{}, {}]), sentence)


def check(found: list[str | None], sentence: str | None) -> None:
    """Every rank ended with ``sentence`` and more, or none did."""
    assert all(
        one is None if sentence is None else one is not None and one.startswith(sentence) for one in found
    )
