"""``tp-mamba verify``: passes on what is right, fails on what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tp_mamba.engine import memory
from tp_mamba.launch import cli
from tp_mamba.launch.oracle import transformers_logits
from tp_mamba.launch.verbs import verify
from tp_mamba.model import MambaForCausalLM


def test_one_and_two_ranks_against_transformers(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["verify", str(sample), "--tp", "1,2", "--device", "cpu", "--tokens", "32", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == "transformers"
    assert report["ok"] is True
    assert [size["ranks"] for size in report["sizes"]] == [1, 2]
    assert 0 < report["reference_error"] < 1e-5
    assert report["tolerance"] == max(2 * report["reference_error"], verify.LEAST_TOLERANCE)
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


def test_a_real_models_depth_and_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # mamba-130m's shapes, with transformers' own initial weights: no fixed bound of use holds here.
    config = transformers.MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    argv = ["verify", str(tmp_path), "--tp", "1", "--device", "cpu", "--tokens", "4", "--json"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == "transformers"
    assert 1e-5 < report["reference_error"] < 2e-3
    assert report["tolerance"] == 2 * report["reference_error"]
    assert 1e-5 < report["sizes"][0]["error"] <= report["tolerance"]


@pytest.mark.parametrize("family", ["Mamba", "FalconMamba"])
def test_transformers_in_float64_is_float64(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(hidden_size=32, num_hidden_layers=3, vocab_size=50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    theirs = transformers_logits(str(tmp_path), ids, torch.float64)
    with torch.inference_mode():
        ours = MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, device="cpu")(ids)[0]
    assert theirs.dtype == ours.dtype == torch.float64
    assert verify.error_of(ours, theirs) < 1e-13
    assert verify.error_of(transformers_logits(str(tmp_path), ids, torch.float32), theirs) > 1e-9


@pytest.fixture
def misnamed(sample: Path, tmp_path: Path) -> Path:
    """The sample with names that begin with ``model.``: transformers finds none of them, and says nothing."""
    tensors = {
        name.replace("backbone.", "model."): tensor
        for file in sample.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    folder = tmp_path / "misnamed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(sample / "config.json", folder)
    return folder


def test_what_transformers_fills_at_random_is_no_reference(
    misnamed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["verify", str(misnamed), "--tp", "1", "--device", "cpu", "--tokens", "8"]
    assert cli.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["against"] == "single"
    assert "note: transformers did not find" in err
    assert "fills them at random" in err
    assert "compared with one rank instead" in err
    assert cli.main([*argv, "--against", "transformers"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: --against transformers, but transformers did not find" in err


def test_where_float64_does_not_fit(
    sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert cli.main(["verify", str(sample), "--tp", "1", "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["reference_error"], report["tolerance"]) == (None, verify.FIXED_TOLERANCE)
    assert "note: float64 takes" in err
