"""Tensor-parallel Mamba-1 in PyTorch.

The names below are what most programs need. Each is imported from its module when it is first used, so that
``tp-mamba --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp_mamba.batch import MambaMetadata, MambaMetadataBuilder
    from tp_mamba.checkpoint.load import load_mixer
    from tp_mamba.config import MambaConfig
    from tp_mamba.engine.engine import Engine
    from tp_mamba.engine.params import SamplingParams
    from tp_mamba.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
    from tp_mamba.layers.norm import RMSNorm
    from tp_mamba.layers.vocab import ParallelLMHead, VocabParallelEmbedding
    from tp_mamba.mixer import MambaMixer, MambaState
    from tp_mamba.model import MambaForCausalLM, build_mixer
    from tp_mamba.options import CacheConfig, ModelConfig
    from tp_mamba.parallel.group import RankFailedError, TensorParallel
    from tp_mamba.parallel.sequence import SequenceParallel
    from tp_mamba.state.cache import MambaCache
    from tp_mamba.text.chat import load_chat_template
    from tp_mamba.text.tokenizer import load_tokenizer

_MODULES = {
    "CacheConfig": "options",
    "ColumnParallelLinear": "layers.linear",
    "Engine": "engine.engine",
    "MambaCache": "state.cache",
    "MambaConfig": "config",
    "MambaForCausalLM": "model",
    "MambaMetadata": "batch",
    "MambaMetadataBuilder": "batch",
    "MambaMixer": "mixer",
    "MambaState": "mixer",
    "MergedColumnParallelLinear": "layers.linear",
    "ModelConfig": "options",
    "ParallelLMHead": "layers.vocab",
    "RMSNorm": "layers.norm",
    "RankFailedError": "parallel.group",
    "RowParallelLinear": "layers.linear",
    "SamplingParams": "engine.params",
    "SequenceParallel": "parallel.sequence",
    "TensorParallel": "parallel.group",
    "VocabParallelEmbedding": "layers.vocab",
    "build_mixer": "model",
    "load_chat_template": "text.chat",
    "load_mixer": "checkpoint.load",
    "load_tokenizer": "text.tokenizer",
}

__all__ = [
    "CacheConfig",
    "ColumnParallelLinear",
    "Engine",
    "MambaCache",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaMetadata",
    "MambaMetadataBuilder",
    "MambaMixer",
    "MambaState",
    "MergedColumnParallelLinear",
    "ModelConfig",
    "ParallelLMHead",
    "RMSNorm",
    "RankFailedError",
    "RowParallelLinear",
    "SamplingParams",
    "SequenceParallel",
    "TensorParallel",
    "VocabParallelEmbedding",
    "build_mixer",
    "load_chat_template",
    "load_mixer",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("tp-mamba")
    if name not in _MODULES:
        raise AttributeError(f"module 'tp_mamba' has no attribute {name!r}")
    return getattr(import_module(f"tp_mamba.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
