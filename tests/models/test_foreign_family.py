"""A family from outside: every tensor renamed, and in_proj kept in two, without a line of the package changed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_mamba import MambaConfig, MambaForCausalLM, TensorParallel, load_mixer
from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.load import load_rank
from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.model import build_mixer
from tp_mamba.models.block import MambaBlock
from tp_mamba.models.fields import get_dtype, get_field
from tp_mamba.models.registry import Family, register_family, unregister_family
from tp_mamba.parallel.sharding import sharded_tensors

OUTSIDE = {
    "backbone.embeddings.weight": "tok.w",
    "backbone.norm_f.weight": "out.scale",
    "lm_head.weight": "out.w",
}
INSIDE = {
    "norm.weight": "scale",
    "mixer.A_log": "ssm.log_a",
    "mixer.D": "ssm.skip",
    "mixer.conv1d.weight": "conv.w",
    "mixer.conv1d.bias": "conv.b",
    "mixer.x_proj.weight": "ssm.to_dt_bc",
    "mixer.dt_proj.weight": "ssm.dt.w",
    "mixer.dt_proj.bias": "ssm.dt.b",
    "mixer.out_proj.weight": "down",
}
JOINED = {"mixer.in_proj.weight": ("up", "gate")}
TO_OURS = {theirs: ours for ours, theirs in INSIDE.items()} | {
    theirs: ours for ours, parts in JOINED.items() for theirs in parts
}


def our_name(name: str) -> str:
    if match := re.fullmatch(r"block(\d+)/(.+)", name):
        return f"backbone.layers.{match[1]}.{TO_OURS.get(match[2], match[2])}"
    return {theirs: ours for ours, theirs in OUTSIDE.items()}.get(name, name)


def file_names(name: str) -> tuple[str, ...]:
    if name in OUTSIDE:
        return (OUTSIDE[name],)
    _, _, index, inside = name.split(".", 3)
    return tuple(f"block{index}/{theirs}" for theirs in JOINED.get(inside, (INSIDE.get(inside, inside),)))


def parse(fields: Mapping[str, Any]) -> dict[str, Any]:
    width = get_field(fields, "width", int)
    return {
        "model_type": "stranger",
        "hidden_size": width,
        "intermediate_size": get_field(fields, "inner", int),
        "num_hidden_layers": get_field(fields, "depth", int),
        "state_size": get_field(fields, "memory", int),
        "conv_kernel": 4,
        "time_step_rank": 3,
        "vocab_size": get_field(fields, "words", int),
        "tie_word_embeddings": False,
        "dtype": get_dtype(fields),
    }


def render(config: MambaConfig) -> dict[str, Any]:
    return {
        "kind": "stranger",
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "depth": config.num_hidden_layers,
        "memory": config.state_size,
        "words": config.vocab_size,
        "dtype": str(config.dtype).removeprefix("torch."),
    }


STRANGER = Family(
    model_type="stranger",
    recognises=lambda fields: fields.get("kind") == "stranger",
    parse=parse,
    render=render,
    build_block=MambaBlock,
    our_name=our_name,
    file_names=file_names,
)
FIELDS = {
    "kind": "stranger",
    "width": 20,
    "inner": 31,
    "depth": 2,
    "memory": 5,
    "words": 97,
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_family(STRANGER)
    yield
    unregister_family("stranger")


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as the stranger writes it, made without this package."""
    generator = torch.Generator().manual_seed(0)
    H, D, N, K, R, V = 20, 31, 5, 4, 3, 97
    shapes: dict[str, tuple[int, ...]] = {"tok.w": (V, H), "out.scale": (H,), "out.w": (V, H)}
    for i in range(2):
        inside = {
            "scale": (H,),
            "up": (D, H),
            "gate": (D, H),
            "conv.w": (D, 1, K),
            "conv.b": (D,),
            "down": (H, D),
        }
        ssm = {"log_a": (D, N), "skip": (D,), "to_dt_bc": (R + 2 * N, D), "dt.w": (D, R), "dt.b": (D,)}
        inside |= {f"ssm.{name}": shape for name, shape in ssm.items()}
        shapes |= {f"block{i}/{name}": shape for name, shape in inside.items()}
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIELDS))
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_rank_gets_its_rows_of_what_is_joined(n: int, checkpoint: tuple[Path, dict]) -> None:
    folder, tensors = checkpoint
    config = MambaConfig.from_pretrained(folder)
    for rank in range(n):
        model = MambaForCausalLM(config, TensorParallel.virtual(rank, n))
        source = load_rank(model, folder)
        held = {tensor.name: tensor for tensor in sharded_tensors(model)}
        in_proj = held["backbone.layers.1.mixer.in_proj.weight"]
        full = torch.cat([tensors["block1/up"], tensors["block1/gate"]])
        assert torch.equal(in_proj.read(), in_proj.shard.shard(full, rank, n))
        down = held["backbone.layers.0.mixer.out_proj.weight"]
        assert torch.equal(down.read(), down.shard.shard(tensors["block0/down"], rank, n))
        norms = 3 * 20 * 4  # the only tensors that every rank reads whole
        cut = sum(tensor.nbytes for tensor in tensors.values()) - norms
        assert source.bytes_read <= 1.1 * cut / n + norms  # 31 channels and 97 words are uneven


def test_it_computes_what_the_same_weights_of_mamba_compute(
    checkpoint: tuple[Path, dict], tmp_path: Path
) -> None:
    folder, tensors = checkpoint
    model = MambaForCausalLM.from_pretrained(folder)
    mamba = MambaConfig(
        model_type="mamba",
        **{
            name: getattr(model.config, name)
            for name in MambaConfig.__dataclass_fields__
            if name not in ("model_type", "extra")
        },
    )
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        ours = our_name(name)
        if name.endswith(("/up", "/gate")):
            parts = [tensors[file] for file in file_names(ours)]
            tensor = torch.cat(parts)
        renamed[ours] = tensor
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text(json.dumps(mamba.to_dict()))
    save_file(renamed, tmp_path / "mamba" / "model.safetensors")
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids), MambaForCausalLM.from_pretrained(tmp_path / "mamba")(ids))


def test_it_is_saved_in_its_own_names(checkpoint: tuple[Path, dict], tmp_path: Path) -> None:
    folder, tensors = checkpoint
    MambaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert_same(read(tmp_path / "saved"), tensors)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == FIELDS


@pytest.mark.parametrize("n", [1, 2, 3])
def test_it_shards_and_merges(n: int, checkpoint: tuple[Path, dict], tmp_path: Path) -> None:
    folder, tensors = checkpoint
    shard_checkpoint(folder, tmp_path / "shards", n)
    ids = torch.arange(12)[None]
    assert torch.equal(
        MambaForCausalLM.from_pretrained(tmp_path / "shards")(ids),
        MambaForCausalLM.from_pretrained(folder)(ids),
    )
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    assert_same(read(tmp_path / "merged"), tensors)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == FIELDS


def test_half_of_a_joined_tensor_is_missed_by_its_own_name(checkpoint: tuple[Path, dict]) -> None:
    folder, tensors = checkpoint
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "block1/gate"},
        folder / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"the checkpoint lacks block1/gate, which its config.json asks for"
    ):
        MambaForCausalLM.from_pretrained(folder)
    save_file(tensors | {"block1/gate": torch.ones(30, 20)}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"block1/gate has shape \[30, 20\], config.json asks for \[31, 20\]"
    ):
        MambaForCausalLM.from_pretrained(folder)
    save_file(tensors | {"block1/extra": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the checkpoint holds block1/extra, which"):
        MambaForCausalLM.from_pretrained(folder)


def test_one_mixer(checkpoint: tuple[Path, dict]) -> None:
    folder, tensors = checkpoint
    mixer = build_mixer(MambaConfig.from_pretrained(folder))
    load_mixer(mixer, folder, "backbone.layers.1.mixer")
    assert torch.equal(mixer.D, tensors["block1/ssm.skip"])
    (held,) = [t for t in sharded_tensors(mixer) if t.name == "in_proj.weight"]
    assert torch.equal(held.read(), torch.cat([tensors["block1/up"], tensors["block1/gate"]]))
