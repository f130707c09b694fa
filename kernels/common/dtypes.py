"""The dtypes that everything here takes, by name, and the precision that sums are taken in."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Name -> dtype, in any mixture; float64 is for reference and runs in plain torch."""

FLOATS = frozenset(DTYPES.values())

ANY_FLOAT = " or ".join(", ".join(DTYPES).rsplit(", ", 1))
"""The names, as a sentence gives a choice of them."""

HALVES = frozenset((torch.bfloat16, torch.float16))
"""The dtypes of 16 bits, which tensor cores multiply with sums in float32."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of ``dtype`` are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
