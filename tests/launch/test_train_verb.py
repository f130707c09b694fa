"""``tp-mamba train`` and ``export`` as a person uses them, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp_mamba.launch import cli
from tp_mamba.launch.training.bar import describe
from tp_mamba.training.metrics import plot_losses, read_metrics

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 30
SIZES = ["--hidden-size", "16", "--layers", "1", "--state-size", "4", "--device", "cpu"]
BRIEF = ["--steps", "4", "--batch-size", "4", "--sequence-length", "16", "--log-every", "1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "play.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def command(tmp_path: Path, data: Path) -> list[str]:
    """A training run that works, to be changed."""
    places = ["--data", str(data), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    return ["train", *places, *SIZES, *BRIEF, "--valid-fraction", "0.1"]


def refused(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """The one sentence of a command that fails."""
    try:
        status = cli.main(list(given))
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_resume_export_generate(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "model"
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["best_step"], report["ranks"]) == (4, 4, {"tp": 1, "dp": 1})
    assert "holds a training run already, up to step 4: pass --resume" in refused(capsys, *command)
    longer = [*command, "--steps", "6", "--resume"]
    assert cli.main(longer) == 0
    assert "validation" in capsys.readouterr().err
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert cli.main(["export", str(run), str(out), "--step", "last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert "holds a checkpoint already" in refused(capsys, "export", str(run), str(out))

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert tokenizer("Naïve\n").input_ids == list("Naïve\n".encode())
    assert tokenizer.decode(list(b"First")) == "First"
    generate = [
        "generate",
        str(out),
        "--prompt",
        "First",
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
        "--json",
    ]
    assert cli.main(generate) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 3


def test_from_a_checkpoint_over_two_ranks(sample: Path, data: Path, tmp_path: Path) -> None:
    """The sample's own tokenizer, JSON lines, and torchrun's way in."""
    lines = tmp_path / "notes.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "tuned"
    train = [
        *("-m", "tp_mamba.launch.train", str(sample), "--tp", "2", "--data", str(lines), "--device", "cpu"),
        *("--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--export", str(out)),
        *(
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--sequence-length",
            "8",
            "--lr",
            "1e-4",
            "--sequence-parallel",
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *words, *train], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "step 2 of 2: loss" in done.stderr
    assert (out / "tokenizer.json").read_text() == (sample / "tokenizer.json").read_text()
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (sample, out))
    changed = {
        name: (p - q).abs().max().item()
        for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True)
    }
    assert sum(change > 0 for change in changed.values()) >= len(changed) - 1  # bfloat16 keeps 1 of norm_f
    assert max(changed.values()) < 0.1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--data", "gone.txt"], "the data file gone.txt does not exist"),
        (["--batch-size", "5", "--dp", "2"], "5 rows does not divide by 2 data ranks"),
        (["--steps", "0"], "steps is 0, it must be"),
        (["--lr", "nan"], "lr is nan"),
        (["--warmup", "9"], "warmup is 9 of 4 steps"),
        (["--tp", "64"], "too small for 64 tensor-parallel ranks"),
        (["--hidden-size", "0"], "expected a whole number of at least 1"),
        (["--vocab-size", "100"], "the tokenizer has ids up to 255 and the model a vocabulary of 100"),
        (["--valid-fraction", "1"], "expected a number of at least 0 and below 1"),
        (["--config", "x.json"], "--config and --hidden-size are given"),
        (["--tokenizer", "nowhere/at/all"], "nowhere"),
    ],
)
def test_what_cannot_work_is_refused(
    command: list[str], changes: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, *command, *changes)
    assert not (tmp_path / "run").exists()


def test_other_ranks_than_torchruns_are_refused(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "--tp 3 under torchrun with 4 ranks" in refused(capsys, *command, "--tp", "3")
    assert "--tp 2 --dp 4 under torchrun with 4 ranks" in refused(capsys, *command, "--tp", "2", "--dp", "4")


def test_a_missing_package_is_named(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tp_mamba.training.metrics.find_spec", lambda _: None)
    assert "--plot needs the package matplotlib: pip install 'tp-mamba[train]'" in refused(
        capsys, *command, "--plot"
    )


def test_events_and_plot(command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    assert cli.main([*command, "--plot", "--tensorboard"]) == 0
    assert (tmp_path / "run" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_run_without_records_has_no_plot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        plot_losses(tmp_path)


def test_the_line_of_figures() -> None:
    values = {"loss": 1.23456, "valid_loss": 2.0, "tokens_per_second": 12345.6, "share_of_peak": 0.123}
    assert describe(values) == "loss 1.2346, validation 2.0000, 12,346 tokens/s, 12.3% of peak"
    assert describe({"loss": 1.0}) == "loss 1.0000"
