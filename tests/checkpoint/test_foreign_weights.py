"""A kind of weight that the package does not have goes through loading, saving, sharding and merging by its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_samples import (
    assert_same_bits,
    load_ranks,
    merged,
    odd_config,
    random_tensors,
    read_folder,
    write_checkpoint,
)
from safetensors.torch import load_file

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.config import MambaConfig
from tp_mamba.layers.weights import LinearWeight, register_weight_kind
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import Shard

KIND = "test_factors"
RANK = 3


class Factors(LinearWeight):
    """``W = left [out, 3] @ right [3, in]``: the cut dimension is one factor's, and the other factor is whole."""

    def declare(self, layer, whole, *, dtype, device):
        out, inner = whole.shape
        cut = {"dim": whole.dim, "pieces": whole.pieces, "granularity": whole.granularity}
        left = Shard(shape=(out, RANK), **(cut if whole.dim == 0 else {}))
        right = Shard(shape=(RANK, inner), **(cut if whole.dim == 1 else {}))
        for name, shard in (("left", left), ("right", right)):
            layer.add_parameter(name, shard, dtype=dtype, device=device)

    def initialize(self, layer, draw):
        torch.nn.init.normal_(layer.left)
        torch.nn.init.normal_(layer.right)

    @torch.no_grad()
    def divide_(self, layer, divisor):
        layer.left.div_(divisor)

    def product(self, layer, x, bias=None):
        return torch.nn.functional.linear(x @ layer.right.T, layer.left, bias)


register_weight_kind(KIND, Factors())

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@pytest.fixture
def origin(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of factors, in which no tensor is called ``in_proj.weight``."""
    config = MambaConfig.from_dict(odd_config().to_dict() | {"quantization_config": {"quant_method": KIND}})
    assert config.weight_kind == KIND
    tensors = random_tensors(config)
    names = {name.split("mixer.")[-1] for name in tensors}
    assert {f"{name}.{factor}" for name in PROJECTIONS for factor in ("left", "right")} <= names
    assert not {f"{name}.weight" for name in PROJECTIONS} & names
    return write_checkpoint(tmp_path / "origin", config, tensors), tensors


@pytest.mark.parametrize("n", [1, 2, 3])
def test_loader_shard_and_merge(n: int, origin: tuple, tmp_path: Path) -> None:
    folder, tensors = origin
    models, _ = load_ranks(folder, n)
    assert_same_bits(merged(models), tensors)
    shard_checkpoint(folder, tmp_path / "shards", n)
    again, read = load_ranks(tmp_path / "shards", n)
    assert_same_bits(merged(again), tensors)
    assert sum(read) == sum(
        tensor.nbytes for file in read_files(tmp_path / "shards") for tensor in file.values()
    )
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    assert_same_bits(read_folder(tmp_path / "merged"), tensors)
    assert MambaConfig.from_pretrained(tmp_path / "merged").weight_kind == KIND


def read_files(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def _save_and_compute(tp: TensorParallel, folder: Path, target: Path) -> torch.Tensor:
    model = MambaForCausalLM.from_pretrained(folder, tp)
    model.save_pretrained(target)
    return model(torch.arange(12)[None])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_saver_and_logits(n: int, origin: tuple, ranks, tmp_path: Path) -> None:
    """What n processes save is what they loaded, and they compute what the multiplied-out model does."""
    folder, tensors = origin
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith(".left"):
            dense[name.replace(".left", ".weight")] = tensor @ tensors[name.replace(".left", ".right")]
        elif not name.endswith(".right"):
            dense[name] = tensor
    write_checkpoint(tmp_path / "dense", odd_config(), dense)
    expected = MambaForCausalLM.from_pretrained(tmp_path / "dense")(torch.arange(12)[None])
    for logits in ranks(n).run(_save_and_compute, folder, tmp_path / "saved"):
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_same_bits(read_folder(tmp_path / "saved"), tensors)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["quantization_config"] == {"quant_method": KIND}


def test_a_kind_that_is_not_registered_is_refused(origin: tuple) -> None:
    folder, _ = origin
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(fields | {"quantization_config": {"quant_method": "other"}})
    )
    with pytest.raises(CheckpointError, match="other"):
        MambaForCausalLM.from_pretrained(folder)
