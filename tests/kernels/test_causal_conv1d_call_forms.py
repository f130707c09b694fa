"""causal-conv1d's calls of its two functions, forward only: channel-first and channel-last, states in and out.

Their signatures are ours; circular states and the states of packed sequences are in test_circular_conv_state.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from call_form_testing import PLACES, Memory, Work, copies, randn
from conv_norm_testing import run_on
from kernel_testing import assert_within_twice, double

from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference, causal_conv1d_update_reference
from tp_mamba.kernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CALLS = [(2, True, "silu"), (3, False, "silu"), (4, True, None)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def parameters(d: int, k: int, bias: bool) -> dict[str, torch.Tensor | None]:
    """Weights in float32 whatever the dtype of x."""
    return {"weight": randn(d, k, seed=1), "bias": randn(d, seed=2) if bias else None}


def check_forward(
    device: str, place: str, dtype: torch.dtype, k: int, bias: bool, activation: str | None
) -> None:
    """Channels ``8 .. 8 + D`` of wider memory, whole sequences, with and without an initial and a final state."""
    d = {"cpu": 40, "interpreter": 33, "cuda": 4096 + 32}[place]
    for length in {"cpu": (1, 2, 67), "interpreter": (k + 3,), "cuda": (1, 2, 151, 2048)}[place]:
        for channel_last in (False, True):
            wide = (2, length, 8 + d + 4) if channel_last else (2, 8 + d + 4, length)
            x = randn(*wide, seed=3, dtype=dtype)
            x = x[..., 8 : 8 + d].transpose(1, 2) if channel_last else x[:, 8 : 8 + d]
            inputs: dict[str, Any] = {"x": x, **parameters(d, k, bias), "activation": activation}
            for initial in (None, randn(2, k - 1, d, seed=4, dtype=dtype).transpose(1, 2)):
                check_states(inputs, initial, torch.device(device))


def check_states(inputs: dict[str, Any], initial: torch.Tensor | None, device: torch.device) -> None:
    batch, d, _ = inputs["x"].shape
    empty = torch.zeros(batch, d, inputs["weight"].shape[1] - 1, dtype=inputs["x"].dtype)
    given = None if initial is None else torch.ones(batch, dtype=torch.bool)
    reference_states = (empty if initial is None else initial).clone()
    exact_states = reference_states.double()
    exact = causal_conv1d_reference(**double(inputs), has_initial_state=given, conv_states=exact_states)
    reference = causal_conv1d_reference(**inputs, has_initial_state=given, conv_states=reference_states)

    call = copies(inputs | {"initial_states": initial}, device)
    memory = Memory(call)
    with Work() as work:
        out = causal_conv1d_fn(**call)
    assert isinstance(out, torch.Tensor)
    # The operator advances states in place, so that it gets a copy of initial ones: B x D x (K - 1).
    assert work.bytes_written == (0 if initial is None else initial.numel() * initial.element_size())
    assert_within_twice(out, reference, exact)
    assert (out.stride(1) == 1) == (call["x"].stride(1) == 1)

    target = torch.full_like(empty.transpose(1, 2).contiguous(), float("nan"), device=device).transpose(1, 2)
    again, final = causal_conv1d_fn(**call, return_final_states=True, final_states_out=target)
    assert final is target
    assert torch.equal(again, out)
    assert torch.equal(final.cpu(), reference_states)
    assert torch.equal(causal_conv1d_fn(**call, return_final_states=True)[1], final)
    memory.assert_unchanged_but()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "bias", "activation"), CALLS)
def test_forward(place: str, dtype: torch.dtype, k: int, bias: bool, activation: str | None) -> None:
    run_on(place, check_forward, place, dtype, k, bias, activation)


def check_update(
    device: str, place: str, dtype: torch.dtype, k: int, bias: bool, activation: str | None
) -> None:
    """x ``[B, L, D]`` transposed, states of K - 1 to K + 8 inputs; rows in order, gathered, and padded."""
    d = {"cpu": 40, "interpreter": 33, "cuda": 2064}[place]
    every_slot: tuple[list[int] | None, ...] = (None, [6, 2, 9], [6, -1, 9])
    cases = list(product((1, 4, 5), (k - 1, k, k + 8), every_slot))
    if place == "interpreter":
        cases = [(1, k - 1, every_slot[0]), (4, k + 8, every_slot[1]), (5, k, every_slot[2])]
    for length, state_len, slots in cases:
        inputs: dict[str, Any] = {
            "x": randn(3, length, d, seed=5, dtype=dtype).transpose(-1, -2),
            **parameters(d, k, bias),
            "activation": activation,
        }
        if slots is not None:
            inputs["conv_state_indices"] = torch.tensor(slots, dtype=torch.int32)
        state = randn(3 if slots is None else 11, state_len, d, seed=6, dtype=dtype).transpose(-1, -2)
        check_state(inputs, state, slots, torch.device(device))


def check_state(
    inputs: dict[str, Any], state: torch.Tensor, slots: list[int] | None, device: torch.device
) -> None:
    exact_state, reference_state = state.double(), state.clone()
    exact = causal_conv1d_update_reference(**double(inputs), conv_state=exact_state)
    reference = causal_conv1d_update_reference(**inputs, conv_state=reference_state)
    call = copies(inputs | {"conv_state": state}, device)
    memory = Memory(call)
    with Work() as work:
        out = causal_conv1d_update(**call)
    assert not work.operators
    memory.assert_unchanged_but(conv_state=None if slots is None else [slot for slot in slots if slot != -1])
    assert_within_twice(out, reference, exact)
    assert torch.equal(call["conv_state"].cpu(), reference_state)
    assert slots is None or -1 not in slots or not out[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "bias", "activation"), CALLS)
def test_update(place: str, dtype: torch.dtype, k: int, bias: bool, activation: str | None) -> None:
    run_on(place, check_update, place, dtype, k, bias, activation)


def check_parameters_with_strides(device: str) -> None:
    """A bias that is a column, weights whose taps come first in memory: as contiguous ones."""
    x, both = randn(2, 20, 7, seed=7).to(device), randn(20, 2, seed=8).to(device)
    weight = randn(4, 20, seed=9).to(device).t()
    expected = causal_conv1d_fn(x, weight.contiguous(), both[:, 0].contiguous())
    assert torch.equal(causal_conv1d_fn(x, weight, both[:, 0]), expected)
    states = torch.zeros(2, 20, 3, device=device)
    assert torch.equal(causal_conv1d_update(x, states, weight, both[:, 0]), expected)


def test_parameters_with_strides(place: str) -> None:
    run_on(place, check_parameters_with_strides)


def test_slots_in_a_column() -> None:
    """``[B, 1]``, as a block table of one block a sequence has."""
    x, states, weight = randn(2, 6, seed=10), randn(4, 6, 3, seed=11), randn(6, 4, seed=12)
    slots, by_column = torch.tensor([3, 1], dtype=torch.int32), states.clone()
    expected = causal_conv1d_update(x, states, weight, conv_state_indices=slots)
    assert torch.equal(
        causal_conv1d_update(x, by_column, weight, conv_state_indices=slots[:, None]), expected
    )
    assert torch.equal(by_column, states)
    packed = {"query_start_loc": torch.tensor([0, 1, 2], dtype=torch.int32), "conv_states": states}
    expected = causal_conv1d_fn(x.t(), weight, **packed, cache_indices=slots)
    assert torch.equal(causal_conv1d_fn(x.t(), weight, **packed, cache_indices=slots[:, None]), expected)
