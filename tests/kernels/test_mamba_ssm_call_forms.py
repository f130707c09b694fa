"""mamba_ssm's calls of the scan and of the state update, forward only, against float64.

Every layout and form of B and C that its functions take, without a copy but where the docstring says so.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from call_form_testing import (
    PLACES,
    Memory,
    Work,
    check_step,
    copies,
    device_of,
    randn,
    reference_scan,
    scan_inputs,
    step_inputs,
    tie_heads,
)
from kernel_testing import assert_within_twice, double

from tp_mamba.kernels.compat.mamba_ssm import selective_scan_fn
from tp_mamba.kernels.selective_scan.reference import selective_scan_reference
from tp_mamba.kernels.selective_state_update import selective_state_update


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(place: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return device_of(place, monkeypatch)


# ---------------------------------------------------------------------------------------------------------- the scan

FORMS = {
    "constant": lambda b, d, n, length: (d, n),
    "per token": lambda b, d, n, length: (b, n, length),
    "one group": lambda b, d, n, length: (b, 1, n, length),
    "two groups": lambda b, d, n, length: (b, 2, n, length),
    "three groups": lambda b, d, n, length: (b, 3, n, length),
}
"""Shapes of B and C; a constant one is a parameter in float32, the others have the inputs' dtype."""


def add_b_and_c(inputs: dict[str, Any], forms: tuple[str, str], n: int, dtype: torch.dtype) -> dict[str, Any]:
    batch, d, length = inputs["u"].shape
    for seed, (name, form) in enumerate(zip("BC", forms, strict=True)):
        shape = FORMS[form](batch, d, n, length)
        inputs[name] = randn(*shape, seed=90 + seed, dtype=torch.float32 if form == "constant" else dtype)
    return inputs


def check_scan(inputs: dict[str, Any], device: torch.device) -> Work:
    """Output and last state; returns what ran beside the operator. Inputs want a gradient, as in training code."""
    exact, exact_last = selective_scan_reference(**double(inputs))
    reference, reference_last = reference_scan(inputs, device)
    call = copies(inputs, device)
    memory = Memory(call)
    for x in call.values():
        if isinstance(x, torch.Tensor):
            x.requires_grad_()
    with Work() as work, torch.no_grad():
        out, last = selective_scan_fn(**call, return_last_state=True)
    memory.assert_unchanged_but()
    assert out.dtype == inputs["u"].dtype
    assert last.dtype == torch.float32
    assert_within_twice(out, reference, exact, approximate=0.25)  # softplus makes up much of it
    assert_within_twice(last, reference_last, exact_last, approximate=0.25)
    with torch.no_grad():
        assert torch.equal(selective_scan_fn(**call), out)
    return work


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "forms",
    [
        ("constant", "constant"),
        ("constant", "per token"),
        ("per token", "constant"),
        ("per token", "per token"),
        ("one group", "one group"),
        ("two groups", "two groups"),
        ("per token", "three groups"),
    ],
)
def test_forms_of_b_and_c(
    place: str, device: torch.device, forms: tuple[str, str], dtype: torch.dtype
) -> None:
    length = {"cpu": 67, "interpreter": 6, "cuda": 4096}[place]
    inputs = add_b_and_c(scan_inputs(2, 36, length, n=8, dtype=dtype, seed=1), forms, 8, dtype)
    assert not check_scan(inputs, device).operators


@pytest.mark.parametrize("forms", [("two groups", "three groups"), ("constant", "two groups")])
def test_two_numbers_of_groups_above_one_are_copied(
    place: str, device: torch.device, forms: tuple[str, str]
) -> None:
    """Both are brought to a group a channel; mamba_ssm refuses the second, its kernel has no such form."""
    inputs = add_b_and_c(scan_inputs(2, 36, 5, n=4, dtype=torch.float32, seed=11), forms, 4, torch.float32)
    assert check_scan(inputs, device).operators


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_absent_arguments(
    place: str, device: torch.device, absent: tuple[str, ...], delta_softplus: bool
) -> None:
    length = {"cpu": 33, "interpreter": 5, "cuda": 1024}[place]
    inputs = scan_inputs(2, 36, length, n=8, dtype=torch.float32, seed=21)
    inputs = add_b_and_c(inputs, ("per token", "per token"), 8, torch.float32)
    if not delta_softplus:  # then the time steps are used as they are: positive, and mostly small
        inputs |= {
            "delta": inputs["delta"].abs() * 0.1,
            "delta_bias": inputs["delta_bias"].exp(),
            "delta_softplus": False,
        }
    assert not check_scan(inputs | dict.fromkeys(absent), device).operators


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_sequences(device: torch.device, length: int) -> None:
    inputs = scan_inputs(3, 37, length, n=1, dtype=torch.float32, seed=31)
    assert not check_scan(add_b_and_c(inputs, ("per token", "one group"), 1, torch.float32), device).operators


@pytest.mark.parametrize("variable", [True, False])
def test_strides_inside_mamba_inner(place: str, device: torch.device, variable: bool) -> None:
    """x and z are halves of ``[B, 2D, L]``, delta a view of ``[D, B L]``: channels before batch in memory."""
    batch, d, n = 2, {"cpu": 40, "interpreter": 37, "cuda": 768}[place], 8
    length = {"cpu": 33, "interpreter": 5, "cuda": 128}[place]
    inputs = scan_inputs(batch, d, length, n=n, dtype=torch.float32, seed=41)
    inputs["u"], inputs["z"] = randn(batch, 2 * d, length, seed=42).chunk(2, dim=1)
    inputs["delta"] = randn(d, batch * length, seed=43).view(d, batch, length).transpose(0, 1)
    forms = ("one group", "one group") if variable else ("constant", "constant")
    assert not check_scan(add_b_and_c(inputs, forms, n, torch.float32), device).operators


@pytest.mark.parametrize("groups", ["per token", "two groups"])
@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_continue_from_the_last_state(
    place: str, device: torch.device, chunks: int, groups: str
) -> None:
    """``prev_state`` of a chunk is the last state of the one before, which the call leaves as it is."""
    length = {"cpu": 67, "interpreter": 8, "cuda": 2048}[place]
    inputs = scan_inputs(2, 36, length, n=8, dtype=torch.float32, seed=51)
    inputs = add_b_and_c(inputs, (groups, groups), 8, torch.float32)
    exact, exact_last = selective_scan_reference(**double(inputs))
    reference, reference_last = reference_scan(inputs, device)
    call, by_token = copies(inputs, device), ("u", "delta", "B", "C", "z")
    memory, outs, state = Memory(call), [], None
    for start, stop in pairwise([length // chunks * c for c in range(chunks)] + [length]):
        piece = {k: v[..., start:stop] if k in by_token else v for k, v in call.items()}
        before = None if state is None else state.clone()
        previous = state
        out, state = selective_scan_fn(**piece, return_last_state=True, prev_state=previous)
        assert before is None or torch.equal(previous, before)
        outs.append(out)
    memory.assert_unchanged_but()
    assert_within_twice(torch.cat(outs, -1), reference, exact)
    assert_within_twice(state, reference_last, exact_last)


# -------------------------------------------------------------------------------------------------- the state update

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("slots", [None, [13, 4]])
@pytest.mark.parametrize("n", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_update(
    place: str, device: torch.device, dtype: torch.dtype, n: int, slots: list[int] | None
) -> None:
    """States in the inputs' dtype, B and C in float32; the rows in order, or at slots of a larger state."""
    d = {"cpu": 37, "interpreter": 20, "cuda": 2064}[place]
    inputs = step_inputs(2, (d,), n, dtype, gate=n != 32)
    if slots is not None:
        inputs["state_batch_indices"] = torch.tensor(slots, dtype=torch.int32)
    state = randn(2 if slots is None else 15, d, n, seed=61, dtype=dtype)
    check_step(selective_state_update, inputs, state, device, -1, gives_out=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_update_with_heads(
    place: str, device: torch.device, dtype: torch.dtype, groups: int, tied: bool
) -> None:
    """Heads with states of their own, several per group of B and C; tied ones have one A, dt, D and bias per head."""
    heads, d = 4, {"cpu": 9, "interpreter": 6, "cuda": 64}[place]
    for n, slots in ((16, None), (32, [7, 1])):
        inputs = step_inputs(2, (heads, d), n, dtype, gate=groups != 2, groups=groups)
        if tied:
            inputs = tie_heads(inputs)
        if slots is not None:
            inputs["state_batch_indices"] = torch.tensor(slots, dtype=torch.int32)
        state = randn(2 if slots is None else 9, heads, d, n, seed=71, dtype=dtype)
        check_step(selective_state_update, inputs, state, device, -1, gives_out=False)
