"""``tp-mamba plan``: its figures against those worked out by hand for mamba-2.8b over eight ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tp_mamba.launch import cli
from tp_mamba.model import MambaForCausalLM

H, D, LAYERS, R, N, K, V = 2560, 5120, 64, 160, 16, 4, 50280
CONFIG = {
    "model_type": "mamba",
    "hidden_size": H,
    "intermediate_size": D,
    "num_hidden_layers": LAYERS,
    "state_size": N,
    "conv_kernel": K,
    "time_step_rank": R,
    "vocab_size": V,
    "torch_dtype": "float32",
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with the config.json of state-spaces/mamba-2.8b-hf and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def plan_of(folder: Path, capsys: pytest.CaptureFixture[str], *extra: str) -> dict:
    assert cli.main(["plan", str(folder), "--json", *extra]) == 0
    return json.loads(capsys.readouterr().out)


def test_mamba_2_8b_over_eight_ranks(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(published, capsys, "--tp", "8")
    mixer = "backbone.layers.63.mixer"
    local = {tensor["name"]: tensor["local_shape"] for tensor in plan["tensors"]}
    assert local[f"{mixer}.in_proj.weight"] == [1280, 2560]
    assert local[f"{mixer}.conv1d.weight"] == [640, 1, 4]
    assert local[f"{mixer}.x_proj.weight"] == [192, 640]
    assert local[f"{mixer}.dt_proj.weight"] == [640, 160]
    assert local[f"{mixer}.A_log"] == [640, 16]
    assert local[f"{mixer}.out_proj.weight"] == [2560, 640]
    assert local["backbone.embeddings.weight"] == [6285, 2560]
    assert plan["parameters"] == 2_768_345_600
    layer = 1280 * 2560 + 640 * 4 + 640 + 192 * 640 + 640 * 160 + 640 + 640 * 16 + 640 + 2560 * 640 + 2560
    assert plan["bytes_per_rank"] == 4 * (64 * layer + 6285 * 2560 + 2560)
    assert plan["padding_bytes"] == 0
    assert plan["state_bytes_per_sequence"] == 64 * (640 * 3 * 4 + 640 * 16 * 4)
    traffic = plan["communication_per_token"]
    assert traffic["all_reduces"] == 2 * 64 + 1
    assert traffic["all_reduce_bytes"] == 64 * (4 * (160 + 2 * 16) + 4 * 2560) + 4 * 2560
    assert (traffic["all_gathers"], traffic["all_gather_bytes"]) == (1, 4 * 50280)


def test_padding_and_dtype(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Seven ranks divide neither D = 5120 (732 x 7 = 5124) nor V = 50280 (7183 x 7 = 50281).
    plan = plan_of(published, capsys, "--tp", "7", "--dtype", "bfloat16")
    tensors = {tensor["name"]: tensor for tensor in plan["tensors"]}
    mixer = "backbone.layers.0.mixer"
    assert tensors[f"{mixer}.in_proj.weight"]["local_shape"] == [2 * 732, 2560]
    assert tensors[f"{mixer}.in_proj.weight"]["padding_bytes"] == 2 * 4 * 2560 * 2
    assert tensors[f"{mixer}.A_log"]["dtype"] == "float32"
    assert tensors["backbone.embeddings.weight"]["padding_bytes"] == 1 * 2560 * 2
    assert tensors["backbone.norm_f.weight"]["padding_bytes"] == 0
    assert plan["state_bytes_per_sequence"] == 64 * (732 * 3 * 2 + 732 * 16 * 4)
    # x_proj's sums stay float32, out_proj's go in the model's dtype.
    assert plan["communication_per_token"]["all_reduce_bytes"] == 64 * (4 * 192 + 2 * 2560) + 2 * 2560
    assert plan["communication_per_token"]["all_gather_bytes"] == 2 * 50281


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with the config.json of a small state-spaces checkpoint, which declares no dtype."""
    folder = tmp_path / "raw"
    folder.mkdir()
    fields = {"d_model": 16, "n_layer": 1, "vocab_size": 40, "ssm_cfg": {}, "rms_norm": True}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_an_undeclared_dtype_is_that_of_the_weights(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {tensor["name"]: tensor["full_shape"] for tensor in plan_of(raw, capsys)["tensors"]}
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    torch.save(tensors, raw / "pytorch_model.bin")
    plan = plan_of(raw, capsys)
    assert (plan["dtype"], plan["dtype_from"]) == ("float16", "weights")
    loaded = MambaForCausalLM.from_pretrained(raw, device="cpu")
    assert loaded.dtype == torch.float16
    assert plan["bytes_per_rank"] == sum(param.nbytes for param in loaded.parameters())
    assert plan_of(raw, capsys, "--dtype", "bfloat16")["dtype_from"] == "--dtype"
    assert cli.main(["plan", str(raw)]) == 0
    assert "float16 (from weights)" in capsys.readouterr().out


def test_an_undeclared_dtype_without_weights_is_marked(
    raw: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(raw, capsys)
    assert (plan["dtype"], plan["dtype_from"]) == ("float32", "not declared")
    assert cli.main(["plan", str(raw)]) == 0
    assert "float32 (not declared, and no weights here to tell: pass --dtype" in capsys.readouterr().out
    assert plan_of(published, capsys)["dtype_from"] == "config.json"


def test_damaged_weights_of_an_undeclared_dtype(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "pytorch_model.bin").write_bytes(b"PK")
    assert cli.main(["plan", str(raw)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pytorch_model.bin" in line


def test_one_rank_sends_nothing(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = plan_of(published, capsys)["communication_per_token"]
    assert set(traffic.values()) == {0}


def test_table_joins_layers_that_are_alike(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(published), "--tp", "8"]) == 0
    out = capsys.readouterr().out
    assert out.count("in_proj.weight") == 1
    assert "backbone.layers.{0..63}.mixer.in_proj.weight" in out
    assert cli.main(["plan", str(published), "--tp", "8", "--all"]) == 0
    assert capsys.readouterr().out.count("in_proj.weight") == LAYERS


def test_more_ranks_than_channels(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(published), "--tp", "6000"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "6000" in line


@pytest.mark.parametrize("verb", ["plan", "info"])
@pytest.mark.parametrize(
    "absurd",
    [
        {"num_hidden_layers": 2_147_483_647},
        {"hidden_size": 10**30},
        {"vocab_size": 10**30},
        {"state_size": 10**9},
    ],
)
def test_absurd_sizes_take_no_time(
    verb: str, absurd: dict[str, int], sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(sample, tmp_path / "absurd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | absurd))
    assert cli.main([verb, str(folder)]) == 1
    out, err = capsys.readouterr()
    assert len(out + err) < 3000
    if not out:
        assert next(iter(absurd)) in err
