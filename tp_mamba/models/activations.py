"""What a model's activations take, measured without computing anything."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tp_mamba.batch import whole_sequences
from tp_mamba.models.base import CausalLM
from tp_mamba.models.config import MambaConfig
from tp_mamba.parallel.communicate import counted
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial

_TOKENS = 1024
"""Long enough for what does not grow with the tokens to count little."""

_LAYERS = 8
"""Layers of the copy that is measured: activations do not pile up over layers, but layers of several kinds may
alternate."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operators make and that are still alive.

    Attributes:
        peak: the most there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._sizes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else torch would import its compiler with the first operator, to keep it away from this class."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = storage._cdata
            if key not in known and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self._alive)
        return result

    def _forget(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@functools.lru_cache(maxsize=16)
@torch.no_grad()
def activation_bytes_per_token(config: MambaConfig, n: int, dtype: torch.dtype) -> int:
    """Bytes on one of ``n`` ranks that a token of a packed batch adds to the peak of a forward pass, without logits.

    A model on the meta device, of few layers, runs a prompt: nothing is computed, allocated or sent. What the inside
    of a kernel's operator allocates for itself is not seen. Layers that look at data cannot run so, and are taken to
    need what Mamba's do.
    """
    config = replace(config, num_hidden_layers=min(config.num_hidden_layers, _LAYERS))
    copy = CausalLM(config, TensorParallel.virtual(0, n), dtype, "meta")
    # Stands in for the lookup: for its arithmetic on ids of the meta device torch would import its compiler.
    embedded = torch.empty(_TOKENS, config.hidden_size, dtype=dtype, device="meta")
    copy.backbone.embeddings.partial = lambda ids: Partial(embedded.clone(), copy.tp)  # type: ignore[method-assign]
    ids = torch.zeros(_TOKENS, dtype=torch.int64, device="meta")
    try:
        with counted(copy.tp), PeakMemory() as memory:
            copy.backbone(ids, whole_sequences(1, _TOKENS, ids.device), None)
    except NotImplementedError:  # torch's word for asking a meta tensor for its data
        return (4 * config.hidden_size + 8 * -(-config.intermediate_size // n)) * dtype.itemsize
    return -(-memory.peak // _TOKENS)
