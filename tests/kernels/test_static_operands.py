"""Static operands, which kernels may read before the previous kernel has ended: declared, and written by no op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.kernels.common.static_operands import STATIC_OPERANDS, declare_static_operands
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.mixer import MambaMixer
from tp_mamba.state.cache import MambaCache


def test_a_written_or_unknown_argument_is_refused() -> None:
    for argument in ("state", "out", "slots"):
        with pytest.raises(ValueError, match=rf"dt_proj_state_update: {argument} cannot be a static operand"):
            declare_static_operands("tp_mamba::dt_proj_state_update", "weight", argument)
    assert "weight" in STATIC_OPERANDS["tp_mamba::dt_proj_state_update"]


class Traffic(TorchDispatchMode):
    """The ops of ours that are called: the storages that each writes, and those of its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[int], dict[str, int]]] = []
        self._held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "tp_mamba":
            self._held.append((args, kwargs, result))  # so that no storage is used again
            schema = func._schema
            by_name = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
            storages = {
                name: x.untyped_storage().data_ptr()
                for name, x in by_name.items()
                if isinstance(x, torch.Tensor)
            }
            written = {storages[a.name] for a in schema.arguments if a.is_write and a.name in storages}
            made = {
                x.untyped_storage().data_ptr() for x in tree_leaves(result) if isinstance(x, torch.Tensor)
            }
            self.calls.append((schema.name, written | made, storages))
        return result


def conflicts(traffic: Traffic, declared: Mapping[str, frozenset[str]]) -> list[str]:
    """Declared operands that some op has written."""
    written = set().union(*(of_call for _, of_call, _ in traffic.calls))
    return [
        f"{op}: {name}"
        for op, _, storages in traffic.calls
        for name in declared.get(op, ())
        if storages.get(name) in written
    ]


@torch.no_grad()
def test_no_op_of_a_decode_step_writes_what_another_has_declared() -> None:
    """Two layers, two steps; an activation that was declared would be noticed."""
    mixers = [MambaMixer(32, 16, 4, 64, 4, True, False, True) for _ in range(2)]
    cache = MambaCache(mixers, 4)
    slots = [cache.allocate() for _ in range(3)]
    metadata = MambaMetadataBuilder(torch.device("cpu")).build(decode_slots=slots)
    weight, x, residual = torch.ones(32), torch.randn(3, 32), None
    with Traffic() as traffic:
        for _ in range(2):
            for i, mixer in enumerate(mixers):
                x, residual = add_rms_norm(x, residual, weight)
                x = mixer(x, metadata, cache.layer(i))
    assert {"tp_mamba::dt_proj_state_update", "tp_mamba::causal_conv1d_update"} <= {
        op for op, *_ in traffic.calls
    }
    assert not conflicts(traffic, STATIC_OPERANDS)
    wrong = {"tp_mamba::dt_proj_state_update": frozenset({"weight", "x"})}
    assert set(conflicts(traffic, wrong)) == {"tp_mamba::dt_proj_state_update: x"}
