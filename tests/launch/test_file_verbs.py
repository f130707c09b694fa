"""``tp-mamba info``, ``shard`` and ``merge``, and the sample checkpoint they are tried on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.load import load_rank
from tp_mamba.config import MambaConfig
from tp_mamba.launch import cli
from tp_mamba.launch.published import PUBLISHED, Sizes
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def info_of(folder: Path, capsys: pytest.CaptureFixture[str], status: int = 0) -> dict:
    assert cli.main(["info", str(folder), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_sample_has_the_published_layout(sample: Path, sample_script: ModuleType) -> None:
    assert {file.name for file in sample.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        *WEIGHTS,
    }
    tensors = tensors_of(sample)
    layer = ("A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias", "dt_proj.weight")
    layer += ("in_proj.weight", "out_proj.weight", "x_proj.weight")
    names = {"backbone.embeddings.weight", "backbone.norm_f.weight"}  # tied: no lm_head.weight
    for index in range(sample_script.LAYERS):
        names |= {f"backbone.layers.{index}.norm.weight"}
        names |= {f"backbone.layers.{index}.mixer.{name}" for name in layer}
    assert set(tensors) == names
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    index = json.loads((sample / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == names
    assert set(index["weight_map"].values()) == set(WEIGHTS)


def test_transformers_loads_the_sample_whole(sample: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(sample, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_fitted_sample_predicts_its_text(sample_script: ModuleType, one_thread: None) -> None:
    # The closed-form fit is checked on its own forward pass, over a piece of the text.
    text = sample_script.TEXT.read_text()
    tokenizer = sample_script.make_tokenizer(text)
    ids = torch.tensor(tokenizer.encode(text).ids)[: 12 * sample_script.CHUNK + 1]
    weights = sample_script.random_weights(torch.Generator().manual_seed(0))
    sample_script.fit_to_text(weights, ids)
    embedding = weights["backbone.embeddings.weight"]
    h = embedding[ids[:-1].view(-1, sample_script.CHUNK)]
    for layer in range(sample_script.LAYERS):
        out_proj = weights[f"backbone.layers.{layer}.mixer.out_proj.weight"]
        h = h + sample_script.mixer_channels(weights, layer, h) @ out_proj.T
    logits = sample_script.rms_norm(h, weights["backbone.norm_f.weight"]) @ embedding.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:])
    frequencies = torch.bincount(ids[1:], minlength=sample_script.VOCAB).float() / (len(ids) - 1)
    by_frequency = -(frequencies * frequencies.clamp(min=1e-9).log()).sum()
    assert loss < 0.6 * by_frequency


def test_info_of_the_sample(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = info_of(sample, capsys)
    tensors = tensors_of(sample)
    assert report["family"] == "mamba"
    assert report["layout"] == "safetensors"
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["dtype"] == "float32"
    assert report["stored_dtypes"] == {"float32": len(tensors)}
    assert set(report["files"]) == set(WEIGHTS)
    assert report["complete"] is True
    assert report["tokenizer"] is True
    assert report["published_sizes"] is None
    assert report["sizes"]["hidden_size"] == 512
    assert cli.main(["info", str(sample)]) == 0
    assert "yes, every tensor is there" in capsys.readouterr().out


def test_info_names_what_is_wrong(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = tensors_of(sample)
    del tensors["backbone.norm_f.weight"]
    tensors["backbone.extra"] = torch.zeros(3)
    tensors["backbone.layers.0.mixer.D"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(sample / "config.json", tmp_path)
    report = info_of(tmp_path, capsys, status=1)
    assert report["missing"] == ["backbone.norm_f.weight"]
    assert report["unknown"] == ["backbone.extra"]
    assert report["misshapen"] == ["backbone.layers.0.mixer.D"]
    assert report["tokenizer"] is False
    assert cli.main(["info", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "NO" in out
    assert "backbone.extra" in out


EMBEDDING, HEAD, NORM = "backbone.embeddings.weight", "lm_head.weight", "backbone.norm_f.weight"


@pytest.mark.parametrize(
    ("changes", "kind", "names"),
    [
        ({HEAD: EMBEDDING, EMBEDDING: None}, None, []),  # a tied head alone is the embedding
        ({HEAD: EMBEDDING}, None, []),
        ({HEAD: torch.ones(512, 512)}, None, []),  # differs: only reading the two tells
        ({HEAD: torch.ones(3, 512)}, "misshapen", [HEAD]),
        ({NORM: torch.ones(512, dtype=torch.int8)}, "wrong_dtype", [NORM]),
        ({"model.norm_f.weight": NORM}, "duplicate", [[NORM, "model.norm_f.weight"]]),
        ({NORM: torch.ones(9), EMBEDDING: None}, "missing", [EMBEDDING]),
        ({"model.extra": torch.ones(9)}, "unknown", ["model.extra"]),
    ],
)
def test_info_and_loading_agree(
    changes: dict[str, torch.Tensor | str | None],
    kind: str | None,
    names: list,
    sample: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = tensors_of(sample)
    new = {name: tensors[new].clone() if isinstance(new, str) else new for name, new in changes.items()}
    tensors = {name: tensor for name, tensor in (tensors | new).items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(sample / "config.json", tmp_path)
    model = MambaForCausalLM(MambaConfig.from_pretrained(tmp_path), tp=TensorParallel.virtual(0, 1))
    try:
        load_rank(model, tmp_path)
        refusal = None
    except CheckpointError as error:
        refusal = str(error)
    report = info_of(tmp_path, capsys, status=int(refusal is not None))
    assert report["refusal"] == refusal
    assert report["complete"] is (refusal is None)
    if kind is not None:
        assert refusal is not None
        assert report[kind] == names
        assert cli.main(["info", str(tmp_path)]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert f"NO: {refusal}" in out
        assert kind.replace("_", " ") in out


def test_info_of_a_raw_checkpoint(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The original state-spaces layout: a pickle, `embedding` in the singular, the tied head stored again.
    tensors = tensors_of(sample)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = {"d_model": 512, "n_layer": 2, "vocab_size": 509, "ssm_cfg": {}, "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = info_of(tmp_path, capsys)
    assert report["layout"] == "pickled .bin"
    assert report["complete"] is True


def test_shard_and_merge(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, merged = tmp_path / "shards", tmp_path / "merged"
    assert cli.main(["shard", str(sample), str(shards), "--tp", "3", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["ranks"], len(written["files"])) == (3, 3)
    report = info_of(shards, capsys)
    assert report["layout"] == "one file per rank, by tp-mamba shard"
    assert report["complete"] is True
    assert cli.main(["merge", str(shards), str(merged)]) == 0
    assert f"wrote {merged}: " in capsys.readouterr().out
    before, after = tensors_of(sample), tensors_of(merged)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_published_sizes_are_known() -> None:
    assert PUBLISHED[Sizes(2560, 5120, 64, 160, 16, 4, 50280)] == "state-spaces/mamba-2.8b"
    for sizes in PUBLISHED:
        assert sizes.intermediate_size == 2 * sizes.hidden_size
        assert sizes.time_step_rank == sizes.hidden_size // 16
