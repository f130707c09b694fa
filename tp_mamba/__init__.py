"""Tensor-parallel Mamba-1 in PyTorch.

The names below are what most programs need; everything else is imported from its module, for example
``from tp_mamba.mixer import MambaMixer``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp_mamba.cache import MambaCache
    from tp_mamba.config import MambaConfig
    from tp_mamba.generation.params import SamplingParams
    from tp_mamba.generation.tokenizer import load_tokenizer
    from tp_mamba.metadata import MambaMetadataBuilder
    from tp_mamba.mixer import MambaMixer
    from tp_mamba.model import MambaForCausalLM
    from tp_mamba.tensor_parallel import TensorParallel

__all__ = [
    "MambaCache",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaMetadataBuilder",
    "MambaMixer",
    "SamplingParams",
    "TensorParallel",
    "load_tokenizer",
]

_MODULES = {
    "MambaCache": "cache",
    "MambaConfig": "config",
    "MambaForCausalLM": "model",
    "MambaMetadataBuilder": "metadata",
    "MambaMixer": "mixer",
    "SamplingParams": "generation.params",
    "TensorParallel": "tensor_parallel",
    "load_tokenizer": "generation.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``tp-mamba --help`` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'tp_mamba' has no attribute {name!r}")
    return getattr(import_module(f"tp_mamba.{_MODULES[name]}"), name)
