"""What the benchmarks build and check, at tiny sizes on the kernels' CPU path."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_samples import WORKLOADS, built

import tp_mamba.mixer
import tp_mamba.model
from benchmarks import (
    backward,
    collectives,
    conv,
    cpu,
    decode,
    gemm,
    layer,
    long,
    norm,
    scan,
    state_update,
    whole,
)
from benchmarks.ceilings import H200


@pytest.mark.parametrize("name", WORKLOADS)
@torch.no_grad()
def test_check_passes_what_is_right(name: str) -> None:
    errors = built(name).check()
    assert errors
    assert all(error.ok for error in errors), [error.complaint() for error in errors]


@pytest.mark.parametrize("name", WORKLOADS)
@torch.no_grad()
def test_check_sees_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, owner, function = WORKLOADS[name]
    right = getattr(owner, function)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if name == "cpu decode":  # only which logit is the largest matters
            first.copy_(first.roll(1, -1))
        else:
            first[..., -1] *= 1.5
        return result

    monkeypatch.setattr(owner, function, wrong)
    assert not all(error.ok for error in built(name).check())


@torch.no_grad()
def test_a_long_layer_is_checked_to_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = tp_mamba.mixer.MambaMixer
    right = mixer.forward

    def wrong(self: Any, h_TH: torch.Tensor, *args: Any) -> torch.Tensor:
        out_TH = right(self, h_TH, *args)
        if h_TH.shape[0] == 70:  # the one call over all tokens
            out_TH[69] *= 1.5
        return out_TH

    monkeypatch.setattr(mixer, "forward", wrong)
    assert [error.output for error in built("long, layer").check() if not error.ok] == [
        "all tokens, in chunks"
    ]


@pytest.mark.parametrize(
    "module",
    [scan, conv, state_update, norm, backward, gemm, layer, decode, collectives, whole, long, cpu],
)
def test_cases_are_well_formed(module: ModuleType) -> None:
    names = [case.name for case in module.CASES]
    assert len(names) == len(set(names))
    for case in module.CASES:
        assert case.limit is None or case.limit(H200) > 0
        goals = [goal for goal in (case.target.stretch, case.target.must) if goal is not None]
        assert goals == sorted(goals)
        if case.limit is not None and case.target.must is not None:
            assert case.target.must > case.limit(H200) * {"ms": 1e3, "us": 1e6}[case.unit]


def test_scan_is_checked_on_channels_from_end_to_end() -> None:
    cpu_device = torch.device("cpu")
    assert scan.checked_channels(8192, 8192, 16, cpu_device).tolist() == list(range(8192))
    some = scan.checked_channels(1 << 20, 8192, 16, cpu_device)
    assert len(some) == 128
    assert (some[0], some[-1]) == (0, 8191)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in WORKLOADS if not name.startswith("cpu")])
@torch.no_grad()
def test_check_and_time_on_a_gpu(name: str) -> None:
    workload = WORKLOADS[name][0](torch.Generator("cuda").manual_seed(5))
    errors = workload.check()
    assert all(error.ok for error in errors), [error.complaint() for error in errors]
    assert workload.measure(3).least > 0
