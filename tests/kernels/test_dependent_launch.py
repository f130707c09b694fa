"""Kernels that start before the one ahead of them has ended read and write nothing until then."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_testing import Launches, compile_as_launched

from tp_mamba.kernels.dt_bc_split import split_dt_bc
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.skinny_linear import skinny_linear
from tp_mamba.metadata import MambaMetadataBuilder
from tp_mamba.mixer import MambaMixer, MambaState

_HAS_DEPENDENT_LAUNCH = "tp_mamba.kernels.dependent_launch_triton.has_dependent_launch"


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "_product_kernel": ("skinny_linear", lambda: skinny_linear(zeros(2, 2048), zeros(288, 2048))),
    "_sum_kernel": ("skinny_linear", lambda: skinny_linear(zeros(2, 2048), zeros(288, 2048))),
    "_split_kernel": ("dt_bc_split", lambda: split_dt_bc(zeros(2, 288).float(), 256, 16, eps=1e-6)),
    "_tiled_kernel": ("linear_softplus", lambda: linear_softplus(zeros(2, 256), zeros(4096, 256))),
    "_streaming_kernel": ("linear_softplus", lambda: linear_softplus(zeros(80, 256), zeros(256, 256))),
    "_rms_norm_kernel": ("rms_norm", lambda: add_rms_norm(zeros(2, 4096), zeros(2, 4096).float(), None)),
}
"""Kernel: the operator's module, and a call of it that launches the kernel."""


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_or_written_before_the_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, call = CALLS[name]
    module = importlib.import_module(f"tp_mamba.kernels.{op}_triton")
    kernel, recorded = getattr(module, name), Launches()
    monkeypatch.setattr(f"tp_mamba.kernels.{op}.use_triton", lambda x: True)
    monkeypatch.setattr(_HAS_DEPENDENT_LAUNCH, lambda device: True)
    for other in CALLS:
        if CALLS[other][0] == op:
            monkeypatch.setattr(module, other, recorded if other == name else Launches())
    call()
    compiled = compile_as_launched(kernel, recorded.calls[0])
    assert compiled.metadata.launch_pdl
    ahead, wait, behind = compiled.asm["ptx"].partition("griddepcontrol.wait")
    reads = re.compile(r"ld\.global|cp\.async|st\.global")
    assert wait
    assert "griddepcontrol.launch_dependents" in ahead
    assert not reads.search(ahead)
    assert reads.search(behind)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 40])
def test_decode_in_a_graph_has_the_same_bits_without_early_starts(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six layers, each reading what the one before it has just written, replayed again and again."""
    torch.manual_seed(batch)
    layers, H, D, N, K = 6, 1024, 4096, 16, 4
    mixers = [
        MambaMixer(
            H, N, K, D, 128, use_conv_bias=True, use_bias=False, use_rms_norm=True, dtype=torch.bfloat16, device="cuda"
        )
        for _ in range(layers)
    ]  # fmt: skip
    metadata = MambaMetadataBuilder(torch.device("cuda")).build(
        decode_slots=list(range(1, batch + 1)), prefill_slots=[], prefill_lengths=[], has_initial_states=[]
    )
    first = torch.randn(batch, H, dtype=torch.bfloat16, device="cuda")
    results = []
    for early in (True, False):
        monkeypatch.setattr(_HAS_DEPENDENT_LAUNCH, lambda device, early=early: early)
        states = [
            MambaState(
                torch.zeros(batch + 1, K - 1, D, dtype=torch.bfloat16, device="cuda").mT,
                torch.zeros(batch + 1, N, D, device="cuda").mT,
            )
            for _ in range(layers)
        ]
        x = first.clone()

        def step(x: torch.Tensor = x, states: list[MambaState] = states) -> None:
            residual = None
            h = x
            for mixer, state in zip(mixers, states, strict=True):
                h, residual = add_rms_norm(h, residual, None)
                h = mixer(h, metadata, state)
            torch.add(h, first, out=x)  # the next step's input

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        seen = []
        for _ in range(40):
            graph.replay()
            seen.append(x.clone())
        results.append(torch.stack([*seen]))
        results.append(torch.cat([part.flatten().float() for state in states for part in state]))
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
