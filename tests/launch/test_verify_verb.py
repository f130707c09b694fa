"""``tp-mamba verify``: passes on what is right, fails on what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tp_mamba.launch import cli
from tp_mamba.launch.verbs import verify


def test_one_and_two_ranks_against_transformers(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["verify", str(sample), "--tp", "1,2", "--device", "cpu", "--tokens", "32", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == "transformers"
    assert report["ok"] is True
    assert [size["ranks"] for size in report["sizes"]] == [1, 2]
    for size in report["sizes"]:
        assert 0 < size["error"] < 1e-5
        assert size["greedy_agreement"] == 1


@pytest.mark.gpu
def test_a_gpu_against_transformers(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(sample), "--tp", "1", "--device", "cuda", "--json"]) == 0
    (size,) = json.loads(capsys.readouterr().out)["sizes"]
    assert 0 < size["error"] < 1e-4


@pytest.mark.multigpu
def test_two_gpus_against_transformers(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(sample), "--tp", "1,2", "--device", "cuda", "--json"]) == 0
    assert [size["ok"] for size in json.loads(capsys.readouterr().out)["sizes"]] == [True, True]


def test_above_the_tolerance(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Two float32 implementations never agree to 1e-12.
    argv = [
        "verify",
        str(sample),
        "--tp",
        "1",
        "--device",
        "cpu",
        "--prompt",
        "We are",
        "--tolerance",
        "1e-12",
    ]
    assert cli.main(argv) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "float32 logits against transformers" in out


def test_a_wrong_model_fails(
    sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = verify.our_logits

    def wrong(*args: object) -> torch.Tensor:
        return right(*args) + torch.linspace(0, 1, 512)

    monkeypatch.setattr(verify, "our_logits", wrong)
    assert cli.main(["verify", str(sample), "--tp", "1", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_against_one_rank(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify", str(sample), "--tp", "1", "--device", "cpu", "--against", "single", "--json"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == "single"
    assert report["sizes"] == [{"ranks": 1, "error": 0.0, "greedy_agreement": 1.0, "ok": True}]


@pytest.mark.parametrize(
    ("logits", "error", "agreement", "ok"),
    [
        ([[1.0, 2.0], [3.0, -4.0]], 0.0, 1.0, True),
        ([[1.0, 2.0], [3.0, -3.999]], 0.00025, 1.0, True),
        ([[3.0, 2.0], [3.0, -4.0]], 0.5, 0.5, False),
        ([[float("nan"), 2.0], [3.0, -4.0]], None, 0.5, False),
    ],
)
def test_compare(logits: list[list[float]], error: float | None, agreement: float, ok: bool) -> None:
    verdict = verify.compare(torch.tensor(logits), torch.tensor([[1.0, 2.0], [3.0, -4.0]]), 1e-3)
    assert verdict["error"] == (None if error is None else pytest.approx(error, rel=1e-3))
    assert verdict["greedy_agreement"] == agreement
    assert verdict["ok"] is ok


def test_transformers_cannot_read_per_rank_files(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(tmp_path / "shards")
    assert cli.main(["shard", str(sample), shards, "--tp", "2"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", shards, "--tp", "1", "--against", "transformers"]) == 1
    assert "cannot read the layout" in capsys.readouterr().err
    assert cli.main(["verify", shards, "--tp", "1", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"] == "single"
