"""The dtype that weights are stored in, and weights that are numbers of another kind: quantised ones."""

from __future__ import annotations

from collections import Counter
from math import prod

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.kernels.common.dtypes import ANY_FLOAT

_PLAIN = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_PACKED = ("I8", "U8", "int8", "uint8")


def checkpoint_dtype(source: TensorSource) -> torch.dtype:
    """The floating dtype that most numbers of ``source`` have, for configurations that do not name one.

    Raises:
        CheckpointError: it has no tensor of a floating dtype that weights may have.
    """
    numbers: Counter[torch.dtype] = Counter()
    for name in source.names():
        if source.dtype_name(name) in _PLAIN:
            numbers[source.dtype(name)] += prod(source.shape(name))
    if not numbers:
        raise CheckpointError(
            f"the checkpoint holds no tensor in {ANY_FLOAT}: convert it to one of them, or give the folder of a "
            "Mamba-1 model"
        )
    return max(numbers, key=numbers.__getitem__)


def quantized_tensor(source: TensorSource) -> tuple[str, str] | None:
    """Name and dtype of the first tensor that shows ``source`` to be quantised; None where no dtype shows it.

    That is, a matrix or vector of weights in one byte per number or less: float8 and float4 in any variant, and the
    int8 or uint8 in which bitsandbytes and others pack numbers.
    """
    for name in source.names():
        dtype = source.dtype_name(name)
        if dtype in _PACKED:
            packed = name.endswith(("weight", "_packed"))
        else:
            packed = dtype.lower().startswith(
                ("f8", "f4", "f6", "float8", "float4", "i4", "u4", "int4", "uint4")
            )
        if packed:
            return name, dtype
    return None
