"""``tp-mamba generate`` for real: one rank, two ranks, torchrun, and a rank that fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tp_mamba.engine import memory
from tp_mamba.launch import cli

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PROMPT = "First Citizen:\nWe are"
LENGTH = 12


def command(
    *argv: str, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **(env or {})}
    return subprocess.run(
        [*map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
        **options,
    )


@pytest.fixture(scope="module")
def expected(sample: Path) -> dict:
    """What one rank generates, through transformers: greedy ids and text."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(sample / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(sample).eval()
    ids = tokenizer.encode(PROMPT).ids
    with torch.inference_mode():
        for _ in range(LENGTH):
            logits = model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    new = ids[-LENGTH:]
    return {"ids": new, "text": tokenizer.decode(new)}


def arguments(sample: Path, *extra: str) -> list[str]:
    return [
        "generate",
        str(sample),
        "--max-new-tokens",
        str(LENGTH),
        "--device",
        "cpu",
        "--ignore-eos",
        *extra,
    ]


def test_one_rank_streams_prompt_and_text(
    sample: Path, expected: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(sample, "--prompt", PROMPT)) == 0
    out, err = capsys.readouterr()
    assert out.removesuffix("\n") == PROMPT + expected["text"]
    assert "1 x cpu, backend none" in err
    assert f"generated   {LENGTH} tokens" in err


def test_json_is_one_object(sample: Path, expected: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(sample, "--prompt", PROMPT, "--prompt", "Second", "--json")) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    first, second = report["results"]
    assert first == {
        "prompt": PROMPT,
        "text": expected["text"],
        "token_ids": expected["ids"],
        "finish_reason": "length",
    }
    assert second["prompt"] == "Second"
    assert len(second["token_ids"]) == LENGTH
    assert (report["ranks"], report["backend"], report["device"]) == (1, "none", "cpu")
    assert report["new_tokens"] == 2 * LENGTH
    assert report["prefill_seconds"] > 0
    assert report["tokens_per_second"] > 0
    assert report["bytes_per_rank"] == [4 * report["parameters"]]


def test_several_prompts_are_labelled(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(sample, "--prompt", "First", "--prompt", "Second")) == 0
    out = capsys.readouterr().out
    assert "[1] First" in out
    assert "[2] Second" in out


def test_a_prompt_file_and_standard_input(
    sample: Path, expected: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert cli.main(arguments(sample, "--prompt-file", str(tmp_path / "prompt.txt"), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["token_ids"] == expected["ids"]


def test_dtype_is_that_asked_for(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(sample, "--prompt", PROMPT, "--dtype", "bfloat16", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "bfloat16"
    assert report["bytes_per_rank"][0] < 2.1 * report["parameters"]


def test_a_checkpoint_without_tokenizer(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sample.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    assert cli.main(arguments(tmp_path, "--prompt", PROMPT)) == 1
    assert "--tokenizer" in capsys.readouterr().err


def planned(sample: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["plan", str(sample), "--json"]) == 0
    return capsys.readouterr().out


def test_too_little_memory_is_told_before_anything_is_loaded(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(sample / name)  # the weights would be missed
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**23)
    assert cli.main(arguments(tmp_path, "--prompt", "x", "--memory-fraction", "0.75")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "tp-mamba generate: error: the CPU's memory has 8.00 MiB free, a fraction of 0.75 of it may be used, and "
        "13.94 MiB of weights with one sequence take "
    )


def test_max_batch_size_and_its_default(
    sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["--prompt", "The", "--prompt", "We", "--prompt", "All"]
    assert cli.main(arguments(sample, *prompts, "--json")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    results = json.loads(out)["results"]
    plan = json.loads(planned(sample, capsys))
    each = plan["state_bytes_per_sequence"] + 96 * 512 + plan["activation_bytes_per_token"]
    room = plan["bytes_per_rank"] + 2 * each + 9 * plan["activation_bytes_per_token"]
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    limits = ["--max-prefill-tokens", "9", "--memory-fraction", "1"]
    for extra, note in (
        ([], "2 instead of 3 sequences run at a time: the CPU's"),
        (["--max-batch-size", "1"], ""),
    ):
        extra = [*limits, *extra]
        assert cli.main(arguments(sample, *prompts, "--json", *extra)) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["results"] == results
        assert err.startswith(f"tp-mamba generate: note: {note}") if note else err == ""


def test_chat_answers_in_the_checkpoints_template(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(sample, "--chat", "--prompt", "We are")) == 1
    assert "has no chat template" in capsys.readouterr().err
    folder = Path(shutil.copytree(sample, tmp_path / "chat"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    (folder / "chat_template.jinja").write_text(template)
    assert cli.main(arguments(folder, "--prompt", "user: We are\nanswer:", "--json")) == 0
    plain = json.loads(capsys.readouterr().out)["results"][0]
    assert cli.main(arguments(folder, "--chat", "--prompt", "We are", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)["results"][0]
    assert answer == plain | {"prompt": "We are"}
    assert cli.main(arguments(folder, "--chat", "--prompt", "We are")) == 0
    assert capsys.readouterr().out.removesuffix("\n") == answer["text"]  # alone


def test_two_ranks_from_the_command(sample: Path, expected: dict) -> None:
    script = BIN / "tp-mamba"
    done = command(script, *arguments(sample, "--prompt", "-", "--tp", "2", "--json"), input=PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["results"][0]["token_ids"] == expected["ids"]
    assert (report["ranks"], report["backend"]) == (2, "gloo")
    assert len(report["bytes_per_rank"]) == 2
    assert sum(report["bytes_per_rank"]) < 1.01 * 4 * report["parameters"]


@pytest.mark.multigpu
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_on_gpus_ends_the_other(victim: int, sample: Path, tmp_path: Path) -> None:
    # The survivor waits inside an NCCL kernel, which no signal handler of Python's could leave.
    script = [sys.executable, HERE / "faulty_command.py", str(victim), "generating", "kill"]
    environment = {"PYTHONSAFEPATH": "", "FAULT_TIME": str(tmp_path / "time")}
    argv = ["generate", str(sample), "--prompt", PROMPT, "--tp", "2", "--device", "cuda", "--ignore-eos"]
    done = command(*script, *argv, env=environment)
    assert time.time() - float((tmp_path / "time").read_text()) < 30
    assert done.returncode == 1
    assert f"rank {victim} was killed by SIGKILL" in done.stderr


@pytest.mark.multigpu
def test_two_gpus_from_the_command(sample: Path) -> None:
    done = command(BIN / "tp-mamba", "generate", str(sample), "--prompt", PROMPT, "--tp", "auto", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backend"] == "nccl"
    assert report["ranks"] >= 2


@pytest.mark.parametrize("module", [("tp_mamba.launch", "generate"), ("tp_mamba.launch.generate",)])
def test_two_ranks_from_torchrun(module: tuple[str, ...], sample: Path, expected: dict) -> None:
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = arguments(sample, "--prompt", "-")[1:]  # of the ranks' one standard input
    done = command(*torchrun, "-m", module[0], *module[1:], *argv, input=PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == PROMPT + expected["text"]  # once: only rank 0 talks
    assert done.stderr.count("2 x cpu, backend gloo") == 1


def test_an_error_under_torchrun_is_told_once(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = command(*torchrun, "-m", "tp_mamba.launch", "generate", str(tmp_path / "none"), "--prompt", "x")
    assert done.returncode == 1
    assert done.stderr.count("tp-mamba generate: error: ") == 1


@pytest.mark.parametrize(
    ("victim", "place", "fault", "sentence"),
    [
        (1, "loading", "raise", "the weights of this rank are bad"),
        (0, "generating", "raise", "the weights of this rank are bad"),
        (1, "generating", "kill", "rank 1 was killed by SIGKILL; the other ranks have been ended"),
    ],
)
def test_first_error_of_a_rank(
    victim: int, place: str, fault: str, sentence: str, sample: Path, tmp_path: Path
) -> None:
    script = [sys.executable, HERE / "faulty_command.py", str(victim), place, fault]
    # The script's own folder has to be on its path.
    environment = {"PYTHONSAFEPATH": "", "FAULT_TIME": str(tmp_path / "time")}
    done = command(*script, *arguments(sample, "--prompt", PROMPT, "--tp", "2", "--json"), env=environment)
    assert time.time() - float((tmp_path / "time").read_text()) < 30
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"tp-mamba generate: error: {sentence}\n"


def test_a_reader_that_leaves_early(sample: Path) -> None:
    arguments_ = " ".join(arguments(sample, "--prompt", "x"))
    done = command("bash", "-c", f"set -o pipefail; {BIN / 'tp-mamba'} {arguments_} | true")
    assert done.returncode == 128 + 13
    assert done.stderr == ""
