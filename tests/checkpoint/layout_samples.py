"""A few tensors written in every layout without a model, and a refusal to open them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.sources.open import open_source

TENSORS = {
    "a": torch.arange(60, dtype=torch.float32).reshape(12, 5),
    "b": torch.arange(24, dtype=torch.float32).reshape(4, 1, 6).to(torch.bfloat16),
    "c": torch.arange(7, dtype=torch.float64),
}


def write_safetensors(folder, tensors=TENSORS):
    save_file(tensors, folder / "model.safetensors")


def write_bin(folder, tensors=TENSORS):
    torch.save(tensors, folder / "pytorch_model.bin")


def write_legacy_bin(folder):
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_indexed_safetensors(folder):
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"model-{name}.safetensors")
    write_index(
        folder / "model.safetensors.index.json", {name: f"model-{name}.safetensors" for name in TENSORS}
    )


def write_indexed_bin(folder):
    for name, tensor in TENSORS.items():
        torch.save({name: tensor}, folder / f"pytorch_model-{name}.bin")
    write_index(
        folder / "pytorch_model.bin.index.json", {name: f"pytorch_model-{name}.bin" for name in TENSORS}
    )


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def refuse(folder, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_source(folder)
    assert "\n" not in str(refusal.value)
