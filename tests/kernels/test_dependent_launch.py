"""Kernels that start before the one ahead of them has ended read only weights until then, and write nothing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_testing import TRITON_MODULES, Launches, compile_as_launched
from ptx_testing import read_ahead

from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.kernels.linear import skinny_linear
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.rms_norm import add_rms_norm, rms_norm
from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.mixer import MambaMixer, MambaState

_HAS_DEPENDENT_LAUNCH = "tp_mamba.kernels.common.dependent_launch.has_dependent_launch"


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def split(x: torch.Tensor) -> Any:
    weights = {"dt_weight": zeros(256), "b_weight": zeros(16), "c_weight": zeros(16)}
    return split_dt_bc(x, 256, 16, **weights, eps=1e-6, dt_dtype=torch.bfloat16)


def time_steps(T: int, R: int = 256) -> torch.Tensor:
    return linear_softplus(zeros(T, R), zeros(4096, R), zeros(4096))


_OF_SPLIT, _OF_TIME_STEPS = {"dt_weight_ptr", "b_weight_ptr", "c_weight_ptr"}, {"weight_ptr", "bias_ptr"}
CALLS: dict[str, tuple[str, str, set[str], Callable[[], Any]]] = {
    "product": ("linear", "_product_kernel", set(), lambda: skinny_linear(zeros(2, 2048), zeros(288, 2048))),
    "product, slices in turn": (
        "linear",
        "_product_kernel",
        {"weight_ptr"},
        lambda: skinny_linear(zeros(2, 4096), zeros(8192, 4096)),
    ),
    "sum": ("linear", "_sum_kernel", set(), lambda: skinny_linear(zeros(2, 2048), zeros(288, 2048))),
    "split": ("split_dt_bc", "_split_kernel", _OF_SPLIT, lambda: split(zeros(2, 288).float())),
    "split of slices": ("split_dt_bc", "_split_kernel", _OF_SPLIT, lambda: split(zeros(3, 2, 288).float())),
    "dt, few rows": ("linear_softplus", "_tiled_kernel", _OF_TIME_STEPS, lambda: time_steps(2)),
    "dt, more rows": ("linear_softplus", "_tiled_kernel", _OF_TIME_STEPS, lambda: time_steps(64)),
    "dt, few outputs": ("linear_softplus", "_tiled_kernel", _OF_TIME_STEPS, lambda: time_steps(80)),
    "dt, a large rank": ("linear_softplus", "_tiled_kernel", {"bias_ptr"}, lambda: time_steps(2, 1024)),
    "dt, streaming": ("linear_softplus", "_streaming_kernel", set(), lambda: time_steps(600)),
    "norm": ("rms_norm", "_rms_norm_kernel", {"weight_ptr"}, lambda: rms_norm(zeros(2, 4096), zeros(4096))),
    "norm of a sum": (
        "rms_norm",
        "_rms_norm_kernel",
        {"weight_ptr"},
        lambda: add_rms_norm(zeros(2, 4096), zeros(2, 4096).float(), zeros(4096)),
    ),
}  # fmt: skip
"""The module of its op, the kernel, the weights that this reads early, and a call of it that launches the kernel."""
ELSEWHERE = {
    *("_step_kernel", "state_update_rows_kernel", "dt_proj_state_update_kernel"),
    *("_one_way_kernel", "_two_ways_kernel", "_all_reduce_add_rms_norm_kernel", "_all_reduce_split_kernel"),
    "_add_shares_kernel",
}
"""Those whose own modules hold the same test."""


def compiled_for(case: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel as the case's call launches it on a Hopper GPU."""
    op, name, _, call = CALLS[case]
    folder = f"tp_mamba.kernels.{op.partition('.')[0]}"
    modules = [importlib.import_module(each) for each in TRITON_MODULES if each.startswith(folder + ".")]
    (module,) = (each for each in modules if hasattr(each, name))
    kernel, recorded = getattr(module, name), Launches()
    with monkeypatch.context() as patch:
        patch.setattr(f"tp_mamba.kernels.{op}.use_triton", lambda x: True)
        patch.setattr(_HAS_DEPENDENT_LAUNCH, lambda device: True)
        for other in {CALLS[each][1] for each in CALLS if CALLS[each][0] == op}:
            patch.setattr(module, other, recorded if other == name else Launches())
        call()
    (launch,) = recorded.calls
    return compile_as_launched(kernel, launch)


@pytest.mark.parametrize("case", CALLS)
def test_only_weights_are_read_before_the_wait(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_ahead(compiled_for(case, monkeypatch)) == CALLS[case][2]


def test_no_kernel_that_starts_early_is_left_out() -> None:
    from triton.runtime.jit import JITFunction

    found = set()
    for each in TRITON_MODULES:
        found |= {
            name
            for name, x in vars(importlib.import_module(each)).items()
            if isinstance(x, JITFunction) and "PDL" in x.arg_names and x.module == each
        }
    helpers = {"let_next_start", "wait_for_kernel_ahead"}
    assert found - helpers == {name for _, name, *_ in CALLS.values()} | ELSEWHERE


def moved(ptx: str, instruction: str) -> str:
    """``ptx`` with the wait behind the first ``instruction`` after it."""
    ahead, wait, behind = ptx.partition("griddepcontrol.wait;")
    first, found, rest = behind.partition(instruction)
    line, end, rest = rest.partition(";")
    assert wait
    assert found
    return ahead + first + found + line + end + wait + rest


def test_a_wait_too_late_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm whose residual, x and output are read or written, one after the other, ahead of the wait."""
    compiled = compiled_for("norm of a sum", monkeypatch)
    ptx = re.sub(
        r"(griddepcontrol\.\w+)\s*;", r"\1;", compiled.asm["ptx"]
    )  # Triton 3.9 puts a blank before it

    def read_in(text: str) -> set[str]:
        return read_ahead(SimpleNamespace(asm={"ptx": text}, metadata=compiled.metadata, src=compiled.src))

    assert read_in(ptx) == {"weight_ptr"}
    assert read_in(moved(ptx, "ld.global")) == {"weight_ptr", "x_ptr"}
    late = ptx
    while "residual_ptr" not in read_in(late):
        late = moved(late, "ld.global")
    assert read_in(late) == {"weight_ptr", "x_ptr", "residual_ptr"}
    for wrong in (
        moved(ptx, "st.global"),
        ptx.replace("griddepcontrol.wait;", ""),
        ptx.replace("griddepcontrol.wait;", "@%p1 griddepcontrol.wait;"),
        ptx.replace("griddepcontrol.wait;", "@%p1 bra $L__BB0_2; griddepcontrol.wait;"),
        ptx.replace("griddepcontrol.wait;", "ld.b32 %r1, [%rd1]; griddepcontrol.wait;"),
        ptx.replace("griddepcontrol.wait;", "ld.global.b32 %r1, [%rd9999]; griddepcontrol.wait;"),
        ptx.replace("griddepcontrol.launch_dependents", "nanosleep.u32 1"),
    ):
        with pytest.raises(AssertionError):
            read_in(wrong)


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
