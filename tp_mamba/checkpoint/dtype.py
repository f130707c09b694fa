"""The dtype a checkpoint's weights are stored in, for configurations that do not say."""

from __future__ import annotations

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.matching import WEIGHT_DTYPES
from tp_mamba.checkpoint.sources.base import TensorSource


def checkpoint_dtype(source: TensorSource) -> torch.dtype:
    """Dtype of the first ``in_proj.weight`` of ``source``, which stands for its weights.

    Raises:
        CheckpointError: there is none, or it is not of a weight's dtype.
    """
    name = next((name for name in source.names() if name.endswith(".in_proj.weight")), None)
    if name is None:
        raise CheckpointError(
            "the checkpoint holds no in_proj.weight, so it has no Mamba layers: give the folder of a Mamba-1 model"
        )
    dtype = source.dtype(name)
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{name} has dtype {str(dtype).removeprefix('torch.')}, which is no weight's: convert the checkpoint to "
            "float32, bfloat16 or float16"
        )
    return dtype
