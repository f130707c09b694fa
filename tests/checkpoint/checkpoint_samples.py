"""Small checkpoints for the tests of this folder, written in every layout by hand or by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tp_mamba.checkpoint.load import load_rank
from tp_mamba.config import MambaConfig
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors

# Odd on purpose: D = 30 and V = 97 divide by none of 4, 7, 8; R and N are odd; K is not 4.
ODD = {"hidden_size": 20, "intermediate_size": 30, "num_hidden_layers": 2, "state_size": 5, "conv_kernel": 3}
ODD |= {"time_step_rank": 3, "vocab_size": 97}


def odd_config(**changes: object) -> MambaConfig:
    return MambaConfig(**({"model_type": "mamba", "dtype": torch.float32} | ODD | changes))


def random_tensors(
    config: MambaConfig, dtype: torch.dtype | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Every tensor of the model under its checkpoint name: normal, scaled as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    model = MambaForCausalLM(config, device="meta")
    return {
        tensor.name: (torch.randn(tensor.shard.shape, generator=generator) * 0.3).to(dtype or config.dtype)
        for tensor in sharded_tensors(model)
    }


def write_checkpoint(folder: Path, config: MambaConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """``config.json`` and one ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_indexed(
    folder: Path, config: MambaConfig, tensors: dict[str, torch.Tensor], files: int = 3
) -> Path:
    """``config.json`` and the tensors dealt over several safetensors files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    weight_map = {
        name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def write_raw(
    folder: Path, config: MambaConfig, tensors: dict[str, torch.Tensor], usable_vocab_size: int
) -> Path:
    """The original state-spaces layout: ``pytorch_model.bin``, singular embedding, duplicated head, bare config."""
    folder.mkdir(parents=True, exist_ok=True)
    ssm_cfg = {"d_state": config.state_size, "d_conv": config.conv_kernel, "dt_rank": config.time_step_rank}
    fields = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": usable_vocab_size,
    }
    ssm_cfg["expand"] = config.intermediate_size / config.hidden_size
    fields |= {"ssm_cfg": ssm_cfg, "rms_norm": True, "residual_in_fp32": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(fields))
    raw = {name.replace("embeddings", "embedding"): tensor for name, tensor in tensors.items()}
    torch.save(raw | {"lm_head.weight": raw["backbone.embedding.weight"]}, folder / "pytorch_model.bin")
    return folder


def load_ranks(
    folder: Path, n: int, dtype: torch.dtype | None = None
) -> tuple[list[MambaForCausalLM], list[int]]:
    """Every rank's model of ``n``, loaded in this process one after the other, and the bytes each read."""
    config = MambaConfig.from_pretrained(folder)
    models = [MambaForCausalLM(config, tp=TensorParallel.virtual(rank, n), dtype=dtype) for rank in range(n)]
    return models, [load_rank(model, folder).bytes_read for model in models]


def merged(models: list[MambaForCausalLM]) -> dict[str, torch.Tensor]:
    """The full tensors, as a checkpoint would hold them, from every rank's model."""
    ranks = [list(sharded_tensors(model)) for model in models]
    return {
        parts[0].name: parts[0].shard.merge([part.read() for part in parts])
        for parts in zip(*ranks, strict=True)
    }


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
