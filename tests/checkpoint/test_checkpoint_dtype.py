"""The dtype of a checkpoint's weights, told from its headers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tp_mamba.checkpoint.dtype import checkpoint_dtype, quantized_tensor
from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.sources.open import open_source


def source_of(folder, **dtypes):
    """Two tensors of ten numbers and the others of two, with ``__`` in place of dots."""
    sizes = [10, 10, *[2] * len(dtypes)]
    tensors = {
        name.replace("__", "."): torch.zeros(size).to(dtype)
        for size, (name, dtype) in zip(sizes, dtypes.items(), strict=False)
    }
    save_file(tensors, folder / "model.safetensors")
    return open_source(folder)


def test_most_numbers_decide(tmp_path):
    source = source_of(tmp_path, a=torch.bfloat16, b=torch.bfloat16, A_log=torch.float32, D=torch.float32)
    assert checkpoint_dtype(source) == torch.bfloat16


def test_no_weights_at_all(tmp_path):
    with pytest.raises(
        CheckpointError, match="holds no tensor in float32, bfloat16, float16 or float64: convert it"
    ):
        checkpoint_dtype(source_of(tmp_path, a=torch.int8))


@pytest.mark.parametrize(
    ("name", "dtype", "code"),
    [
        ("layers__0__weight", torch.float8_e4m3fn, "F8_E4M3"),
        ("layers__0__weight", torch.float8_e5m2, "F8_E5M2"),
        ("layers__0__weight", torch.uint8, "U8"),
        ("layers__0__weight", torch.int8, "I8"),
        ("layers__0__position_ids", torch.int8, None),
        ("layers__0__weight", torch.bfloat16, None),
    ],
)
def test_quantised_weights(name, dtype, code, tmp_path):
    source = source_of(tmp_path, a=torch.float32, **{name: dtype})
    assert quantized_tensor(source) == (None if code is None else (name.replace("__", "."), code))


def test_quantised_in_bin_files_and_in_dtypes_that_torch_lacks(tmp_path):
    torch.save({"a.weight": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "pytorch_model.bin")
    assert quantized_tensor(open_source(tmp_path)) == ("a.weight", "uint8")
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert quantized_tensor(open_source(tmp_path)) == ("a", "F8_E8M0")
