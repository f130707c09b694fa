"""causal-conv1d's circular conv state (``cache_seqlens``) and the states of packed sequences, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from call_form_testing import PLACES, Memory, copies, randn, starts_of
from conv_norm_testing import run_on
from kernel_testing import assert_within_twice, double

from tp_mamba.kernels.compat.causal_conv1d import causal_conv1d_update, causal_conv1d_varlen_states


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def circular_reference(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    cache_seqlens: torch.Tensor,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token after token: the ring's last K - 1 inputs and the new one under the taps; then it goes into the ring."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = x[..., None] if x.dim() == 2 else x
    out, (K, state_len) = torch.zeros_like(inputs), (weight.shape[1], conv_state.shape[2])
    for b in range(len(inputs)):
        slot = b if conv_state_indices is None else int(conv_state_indices[b])
        if slot == -1:
            continue
        history = [
            conv_state[slot, :, (int(cache_seqlens[b]) - j) % state_len].clone() for j in range(K - 1, 0, -1)
        ]
        for t in range(inputs.shape[2]):
            history.append(inputs[b, :, t])
            y = sum(h.to(dtype) * weight[:, k].to(dtype) for k, h in enumerate(history[-K:]))
            y = y if bias is None else y + bias.to(dtype)
            out[b, :, t] = y if activation is None else F.silu(y)
            conv_state[slot, :, (int(cache_seqlens[b]) + t) % state_len] = inputs[b, :, t]
    return out[..., 0] if x.dim() == 2 else out


def check_circular(
    device: str, place: str, dtype: torch.dtype, k: int, length: int | None, padded: bool
) -> None:
    """Positions at the ring's start, middle and end, and beyond its length; states of K - 1 to 9 inputs."""
    d = {"cpu": 40, "interpreter": 33, "cuda": 2064}[place]
    for state_len in (k - 1, k + 2, 9):
        inputs: dict[str, Any] = {
            "x": randn(4, length or 1, d, seed=1, dtype=dtype).transpose(1, 2),
            "weight": randn(d, k, seed=2),
            "bias": randn(d, seed=3) if k > 2 else None,
            "activation": "silu" if k > 2 else None,
            "cache_seqlens": torch.tensor([0, 3, state_len, 1007], dtype=torch.int32),
            "conv_state_indices": torch.tensor([6, 2, -1 if padded else 0, 9], dtype=torch.int32),
        }
        if length is None:
            inputs["x"] = inputs["x"][..., 0]
        state = randn(11, d, state_len, seed=4, dtype=dtype)
        reference_state, exact_state = state.clone(), state.double()
        exact = circular_reference(**double(inputs), conv_state=exact_state)
        reference = circular_reference(**inputs, conv_state=reference_state)

        call = copies(inputs | {"conv_state": state}, torch.device(device))
        memory = Memory(call)
        out = causal_conv1d_update(**call)
        memory.assert_unchanged_but(conv_state=[6, 2, 9] if padded else [6, 2, 0, 9])
        assert_within_twice(out, reference, exact)
        assert torch.equal(call["conv_state"].cpu(), reference_state)
        assert not padded or not out[2].any()


@pytest.mark.parametrize(
    ("dtype", "k", "length", "padded"),
    [
        (torch.bfloat16, 4, None, True),
        (torch.float32, 2, 1, False),
        (torch.float32, 4, 5, True),
        (torch.float16, 3, 20, False),  # more inputs than the ring holds
    ],
)
def test_circular_state(place: str, dtype: torch.dtype, k: int, length: int | None, padded: bool) -> None:
    run_on(place, check_circular, place, dtype, k, length, padded)


def check_a_ring_that_goes_round(device: str) -> None:
    """Token after token through a ring: the bits of a linear state, and of a call with all tokens."""
    x, weight = randn(2, 6, 11, seed=5).to(device), randn(6, 4, seed=6).to(device)
    ring, linear = torch.zeros(2, 6, 5, device=device), torch.zeros(2, 6, 3, device=device)
    together = causal_conv1d_update(
        x, torch.zeros_like(ring), weight, None, "silu", torch.zeros(2, device=device).int()
    )
    for t in range(x.shape[2]):
        seen = torch.full((2,), t, dtype=torch.int32, device=device)
        y = causal_conv1d_update(x[..., t], ring, weight, None, "silu", seen)
        assert torch.equal(y, causal_conv1d_update(x[..., t], linear, weight, None, "silu"))
        assert torch.equal(y, together[..., t])


def test_a_ring_that_goes_round(place: str) -> None:
    run_on(place, check_a_ring_that_goes_round)


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 2), (2, 6, 0)])
def test_nothing_to_advance(shape: tuple[int, ...]) -> None:
    state = randn(3, 6, 4, seed=7)
    before, rows = state.clone(), shape[0]
    seen = torch.zeros(rows, dtype=torch.int32)
    out = causal_conv1d_update(torch.zeros(shape), state, randn(6, 4, seed=8), cache_seqlens=seen)
    assert out.shape == shape
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cache_seqlens": torch.zeros(3, dtype=torch.int32)},
            r"cache_seqlens has shape \[3\] but \[B\] is \[2\]",
        ),
        ({"cache_seqlens": torch.zeros(2)}, r"cache_seqlens has dtype torch.float32"),
        (
            {"conv_state": torch.zeros(2, 6, 2)},
            r"conv_state has shape \[2, 6, 2\] .* state_len at least K - 1",
        ),
        ({"conv_state": torch.zeros(1, 6, 3)}, r"conv_state has 1 slots for 2 rows"),
        ({"activation": "gelu"}, r"unknown activation 'gelu'"),
        ({"weight": torch.zeros(7, 4)}, r"has 6 channels and weight 7"),
        ({"x": torch.zeros(6)}, r"x has shape \[6\]: expected \[B, D\] or \[B, D, L\]"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    call = {"x": torch.ones(2, 6), "conv_state": torch.zeros(2, 6, 3), "weight": torch.zeros(6, 4)}
    call |= {"cache_seqlens": torch.zeros(2, dtype=torch.int32)} | change
    with pytest.raises(ValueError, match=f"^causal_conv1d_update: .*{message}"):
        causal_conv1d_update(**call)
    assert not call["conv_state"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_len", [1, 3, 6])
def test_states_of_packed_sequences(state_len: int, dtype: torch.dtype) -> None:
    """Sequences longer and shorter than the state, and one without tokens."""
    lengths = [7, 1, 0, 3, 2]
    x, starts = randn(sum(lengths), 5, seed=9, dtype=dtype), starts_of(lengths)
    expected = torch.zeros(len(lengths), 5, state_len, dtype=dtype)
    for s, piece in enumerate(x.split(lengths)):
        for j, row in enumerate(reversed(piece[-state_len:])):
            expected[s, :, state_len - 1 - j] = row
    states = causal_conv1d_varlen_states(x, starts, state_len)
    assert torch.equal(states, expected)
    assert states.stride(1) == 1
    assert torch.equal(causal_conv1d_varlen_states(x, starts.long(), state_len), expected)


def test_states_of_no_tokens() -> None:
    assert causal_conv1d_varlen_states(torch.zeros(0, 5), starts_of([0, 0]), 3).shape == (2, 5, 3)
    assert causal_conv1d_varlen_states(torch.zeros(0, 5), starts_of([]), 3).shape == (0, 5, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 5)}, r"x has shape \[2, 3, 5\]: expected \[T, D\]"),
        ({"cu_seqlens": torch.zeros(2)}, r"cu_seqlens has dtype torch.float32"),
        (
            {"cu_seqlens": torch.zeros(0, dtype=torch.int32)},
            r"cu_seqlens has shape \[0\]: expected \[S \+ 1\]",
        ),
        ({"state_len": 0}, r"state_len is 0: expected a whole number of 1 or more"),
    ],
)
def test_refusals_of_packed_states(change: dict[str, Any], message: str) -> None:
    call = {"x": torch.zeros(3, 5), "cu_seqlens": starts_of([3]), "state_len": 3} | change
    with pytest.raises(ValueError, match=f"^causal_conv1d_varlen_states: {message}"):
        causal_conv1d_varlen_states(**call)
