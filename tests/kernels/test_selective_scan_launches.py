"""The scan's kernels: the same bits at every launch, and what their loops cost on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import DEVICES, Launches, compile_for_hopper, stack_bytes, to, triton_device
from scan_testing import CUTS, force_any, force_cut, loop_of
from test_selective_scan import make

from tp_mamba.kernels.common.device import DeviceProperties
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_scan.arguments import SelectiveScan
from tp_mamba.kernels.selective_scan.launch import LaunchPlan, mixer_plan
from tp_mamba.kernels.selective_scan.operands import arguments_of

H100 = DeviceProperties(sm_count=132, shared_bytes_per_sm=228 * 1024)


@pytest.mark.parametrize("channels", [32, 38])
@pytest.mark.parametrize("where", DEVICES)
def test_bits_do_not_depend_on_the_launch(where: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of the kernel for tiles, and the general kernel; empty sequences among them."""
    device = triton_device(where, monkeypatch)
    inputs = to(make(channels, 16, [0, 1, 17, 0], torch.bfloat16), device)
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}  # aligned, as the mixer's are
    results = []
    for cut in [*CUTS, None]:
        if cut is None:
            force_any(monkeypatch)
        else:
            force_cut(*cut, monkeypatch)
        results.append(selective_scan_fn(**inputs, return_last_state=True))
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


def compile_launch(
    sequences: int, channels: int, softplus: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, LaunchPlan]:
    """What is launched for so many sequences and channels as a mixer calls it (or with softplus inside), compiled."""
    from tp_mamba.kernels.selective_scan import mixer

    kernel, recorded = mixer.selective_scan_tiles_kernel, Launches()
    plan = mixer_plan(sequences, channels, 16, softplus, None, H100)
    monkeypatch.setattr(mixer, "selective_scan_tiles_kernel", recorded)
    monkeypatch.setattr(mixer, "mixer_plan", lambda *sizes: plan)
    T, D, N = 8, 128, 16
    x = torch.zeros(T, 2 * D, dtype=torch.bfloat16)
    bc = torch.zeros(T, 2 * N)
    start = torch.tensor([0, T], dtype=torch.int32)
    call = SelectiveScan(
        x[:, :D].t(), x[:, :D].t(), torch.zeros(N, D).t(), bc[:, :N].t()[None], bc[:, N:].t()[None],
        torch.zeros(D), x[:, D:].t(), torch.zeros(D) if softplus else None, softplus,
        start, start[:1], start[:1] > 0, torch.zeros(1, N, D).mT, None, -1, x[:, :D].t(),
    )  # fmt: skip
    assert mixer.launch(*arguments_of(call))
    return compile_for_hopper(kernel, recorded.calls[0]), plan


def names_of(loop: list[str]) -> list[str]:
    return [instruction.split()[0].split(".")[0] for instruction in loop]


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(
    ("sequences", "channels", "softplus", "most"),
    [
        (1, 4096, False, 42),
        (1, 4096, True, 46),
        (1, 8192, False, 66),
        (1, 8192, True, 80),
        (16, 8192, False, 132),
        (16, 8192, True, 156),
    ],
)
def test_loop_of_the_kernel_for_tiles(
    sequences: int, channels: int, softplus: bool, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Instructions per token: gate and softplus once per (token, channel), no spill, loads into shared memory only."""
    compiled, plan = compile_launch(sequences, channels, softplus, monkeypatch)
    steps, lanes = plan.steps, plan.lanes
    assert stack_bytes(compiled, tmp_path) == 0
    loop = loop_of(compiled.asm["cubin"], tmp_path)
    names = names_of(loop)
    once = 2 * softplus + 2  # a softplus and a gate are two each
    assert names.count("MUFU") == steps * 16 // lanes + steps * once // lanes
    assert names.count("SHFL") == steps * (lanes // 2)  # the sum over lanes, and nothing else
    assert names.count("BAR") <= 3
    assert names.count("LDGSTS") <= 7
    assert not {"LDG", "LDL", "STL"} & {*names}
    assert len(loop) / steps <= most


@pytest.mark.pinned_toolchain
def test_choice() -> None:
    """The more sequences, the fewer lanes per channel."""

    def chosen(sequences: int, channels: int, n: int = 16, softplus: bool = False) -> tuple[int, int]:
        plan = mixer_plan(sequences, channels, n, softplus, None, H100)
        return plan.lanes, plan.steps

    assert [chosen(s, 8192) for s in (1, 2, 4, 16)] == [(2, 16), (2, 16), (1, 4), (1, 4)]
    assert [chosen(s, 4096) for s in (1, 2, 4, 64)] == [(4, 16), (2, 16), (2, 16), (1, 4)]
    assert chosen(1, 1) == (4, 16)
    assert [chosen(1, 4096, n) for n in (4, 8, 32)] == [(1, 16), (2, 16), (4, 4)]
    assert [chosen(64, 8192, n) for n in (4, 8, 32)] == [(1, 16), (1, 16), (4, 4)]
    assert [chosen(s, 8192, softplus=True) for s in (1, 16)] == [(2, 8), (1, 4)]
    assert chosen(1, 4096, softplus=True) == (4, 16)


def test_choice_depends_on_the_device() -> None:
    """Warps are few or many for the schedulers of the tensor's own GPU."""
    small, large = replace(H100, sm_count=40), replace(H100, sm_count=528)
    assert mixer_plan(1, 4096, 16, False, None, small).lanes == 2
    assert [mixer_plan(4, 4096, 16, False, None, device).lanes for device in (small, H100, large)] == [
        1,
        2,
        4,
    ]
