"""vLLM's steps of several tokens: packed, drafted, and from slots into other slots; against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from call_form_testing import PLACES, Memory, copies, device_of, randn, starts_of, step_inputs, tie_heads
from conv_norm_testing import run_on
from kernel_testing import assert_within_twice, poisoned_like

from tp_mamba.kernels.compat import vllm
from tp_mamba.kernels.selective_state_update.reference import selective_state_update_reference

NULL = 0


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(place: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return device_of(place, monkeypatch)


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --------------------------------------------------------------------------------------------------- the convolution


def convolve_sequences(
    pieces: list[torch.Tensor],
    pasts: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Each ``[n, D]`` of ``pieces`` after its ``[D, K - 1]`` past inputs, with SiLU, in ``dtype``: ``[T, D]``."""
    outs = []
    for piece, past in zip(pieces, pasts, strict=True):
        inputs = torch.cat([past.to(dtype), piece.to(dtype).t()], 1)
        for t in range(len(piece)):
            y = (inputs[:, t : t + weight.shape[1]] * weight.to(dtype)).sum(1)
            outs.append(F.silu(y if bias is None else y + bias.to(dtype)))
    return torch.stack(outs)


def conv_inputs(place: str, lengths: list[int], k: int, dtype: torch.dtype) -> dict[str, Any]:
    d = {"cpu": 40, "interpreter": 33, "cuda": 2064}[place]
    return {
        "x": randn(sum(lengths), d, seed=1, dtype=dtype),
        "weight": randn(d, k, seed=2),
        "bias": randn(d, seed=3) if k != 3 else None,
        "activation": "silu",
    }


def check_packed_convolution(device: str, place: str, dtype: torch.dtype, k: int) -> None:
    """``query_start_loc`` alone: one to four tokens per sequence, one without any, one at the null block."""
    lengths, slots = [2, 1, 0, 4, 3], [5, 2, 6, NULL, 3]
    inputs = conv_inputs(place, lengths, k, dtype)
    states = randn(8, inputs["x"].shape[1], k + 1, seed=4, dtype=dtype)
    pieces = list(inputs["x"].split(lengths))
    pasts = [states[slot, :, : k - 1] * (slot != NULL) for slot in slots]
    call = copies(inputs | {"conv_state": states}, torch.device(device))
    memory = Memory(call)
    out = vllm.causal_conv1d_update(
        **call,
        query_start_loc=starts_of(lengths).to(device),
        conv_state_indices=int32(*slots, NULL).to(device),
        max_query_len=4,
    )
    memory.assert_unchanged_but(conv_state=[5, 2, 3])
    exact = convolve_sequences(pieces, pasts, inputs["weight"], inputs["bias"], torch.float64)
    reference = convolve_sequences(pieces, pasts, inputs["weight"], inputs["bias"], torch.float32)
    assert_within_twice(out, reference.to(dtype), exact)
    expected = states.clone()
    for piece, past, slot in zip(pieces, pasts, slots, strict=True):
        if slot != NULL:
            expected[slot, :, : k - 1] = torch.cat([past, piece.t()], 1)[:, len(piece) :]
    assert torch.equal(call["conv_state"].cpu(), expected)


@pytest.mark.parametrize(("dtype", "k"), [(torch.bfloat16, 4), (torch.float32, 2), (torch.float32, 3)])
def test_packed_convolution(place: str, dtype: torch.dtype, k: int) -> None:
    run_on(place, check_packed_convolution, place, dtype, k)


def check_drafted_convolution(device: str, place: str, dtype: torch.dtype, k: int, packed: bool) -> None:
    """Windows of K + 3 columns, of which the accepted tokens choose where to begin; columns behind stay as they are."""
    lengths = [2, 1, 0, 4, 3] if packed else [3, 3, 3, 3, 3]
    slots, accepted = [5, 2, 6, NULL, 3], [1, 3, 2, 2, 4 if k < 4 else 3]
    inputs = conv_inputs(place, lengths, k, dtype)
    states = randn(8, inputs["x"].shape[1], k + 3, seed=4, dtype=dtype)
    pieces = list(inputs["x"].split(lengths))
    pasts = [states[s, :, a - 1 : a + k - 2] * (s != NULL) for s, a in zip(slots, accepted, strict=True)]
    call = copies(inputs | {"conv_state": states}, torch.device(device))
    counts = {"num_accepted_tokens": int32(*accepted), "conv_state_indices": int32(*slots)}
    if packed:
        counts |= {"query_start_loc": starts_of(lengths)}
    else:
        call["x"] = call["x"].view(5, 3, -1).transpose(1, 2)
    call |= copies(counts, torch.device(device))
    memory = Memory(call)
    out = vllm.causal_conv1d_update(**call, max_query_len=4 if packed else -1)
    memory.assert_unchanged_but(conv_state=[5, 2, 3] if packed else [5, 2, 6, 3])
    exact = convolve_sequences(pieces, pasts, inputs["weight"], inputs["bias"], torch.float64)
    reference = convolve_sequences(pieces, pasts, inputs["weight"], inputs["bias"], torch.float32)
    if not packed:
        out = out.transpose(1, 2)
        assert not out[3].any()
        out, exact[9:12], reference[9:12] = out.reshape(15, -1), 0, 0
    assert_within_twice(out, reference.to(dtype), exact)
    expected = states.clone()
    for piece, past, slot in zip(pieces, pasts, slots, strict=True):
        if slot != NULL and len(piece):
            window = torch.cat([past[:, 1:], piece.t()], 1)
            expected[slot, :, : window.shape[1]] = window
    assert torch.equal(call["conv_state"].cpu(), expected)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "k"), [(torch.bfloat16, 4), (torch.float32, 2), (torch.float32, 3)])
def test_drafted_convolution(place: str, dtype: torch.dtype, k: int, packed: bool) -> None:
    run_on(place, check_drafted_convolution, place, dtype, k, packed)


def check_drafts_of_a_text(device: str) -> None:
    """Steps of three tokens of which one to three are accepted: what is accepted has the bits of one call over it."""
    x, weight = randn(12, 6, seed=5).to(device), randn(6, 4, seed=6).to(device)
    whole = vllm.causal_conv1d_update(
        x.t()[None], torch.zeros(1, 6, 3, device=device), weight, pad_slot_id=-1
    )[0].t()
    state, at, accepted = torch.zeros(1, 6, 5, device=device), 0, 1
    for following in (1, 3, 2, 3):
        drafts = torch.full(
            (3, 6), float("inf"), device=device
        )  # beyond what is accepted next nothing is read
        drafts[:following] = x[at : at + following]
        y = vllm.causal_conv1d_update(
            drafts.t()[None], state, weight, num_accepted_tokens=int32(accepted).to(device), pad_slot_id=-1
        )
        assert torch.equal(y[0].t()[:following], whole[at : at + following])
        at, accepted = at + following, following


def test_drafts_of_a_text(place: str) -> None:
    run_on(place, check_drafts_of_a_text)


def test_no_tokens_and_no_sequences() -> None:
    weight, state = randn(6, 4, seed=7), randn(3, 6, 5, seed=8)
    before = state.clone()
    for x, more in (
        (torch.zeros(0, 6), {}),
        (torch.zeros(0, 6), {"num_accepted_tokens": int32()}),
        (torch.zeros(0, 6), {"query_start_loc": int32(0)}),
        (torch.zeros(0, 6), {"query_start_loc": int32(0, 0), "conv_state_indices": int32(1)}),
        (
            torch.zeros(0, 6),
            {"query_start_loc": int32(0, 0), "num_accepted_tokens": int32(2), "max_query_len": 1},
        ),
    ):
        assert vllm.causal_conv1d_update(x, state, weight, **more).shape == x.shape
        assert torch.equal(state, before)


# -------------------------------------------------------------------------------------------------- the state update


def run_sequences(
    inputs: dict[str, Any], starts: list[int], initial: list[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """All tokens, one after another in ``dtype``, each sequence from its state: outputs, and the state after each."""
    wide = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    out, states = torch.zeros(inputs["x"].shape, dtype=dtype), []
    for s, first in enumerate(starts[:-1]):
        state, after = initial[s].to(dtype)[None].clone(), []
        for t in range(first, starts[s + 1]):
            row = {
                k: v[t : t + 1] if k in ("x", "dt", "B", "C", "z") and v is not None else v
                for k, v in wide.items()
            }
            out[t] = selective_state_update_reference(state, **row)[0]
            after.append(state[0].clone())
        states.append(after)
    return out, states


def assert_state_step(actual: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
    """As for the scan of few tokens: softplus makes up much of the error."""
    assert_within_twice(actual, reference, exact, approximate=0.25)


def initial_states(state: torch.Tensor, slots: list[int]) -> list[torch.Tensor]:
    return [state[slot] * (slot != NULL) for slot in slots]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("dtype", "heads"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 2)]
)
def test_drafted_states(
    place: str, device: torch.device, dtype: torch.dtype, heads: int | None, in_place: bool
) -> None:
    """The state after each of one to four tokens to a slot of its own, from that after the last accepted one."""
    d, n = {"cpu": 21, "interpreter": 10, "cuda": 528}[place], 16
    lengths, accepted = [2, 1, 4, 3, 0], [0, 4, 2, 1, 3]
    inputs = step_inputs(sum(lengths), (d,) if heads is None else (heads, d), n, dtype, True, heads)
    if heads is not None:
        inputs = tie_heads(inputs)
    # Only the column that is read counts; of the fourth sequence it is the null block.
    source = int32([5, 0, 0, 0], [9, 9, 9, 2], [9, 3, 9, 9], [NULL, 7, 7, 7], [9, 9, 4, 9])
    target = int32([10, 11, 0, 0], [12, 0, 0, 0], [13, 14, NULL, 15], [16, 17, 18, 0], [19, 19, 19, 19])
    if in_place:
        source = int32([5, 6, 0, 0], [7, 8, 9, 2], [10, 3, 11, 12], [NULL, 17, 18, 0], [13, 14, 4, 15])
        target = source
    state = randn(20, *inputs["x"].shape[1:], n, seed=51, dtype=dtype)
    starts = starts_of(lengths).tolist()
    initial = initial_states(state, [5, 2, 3, NULL, 4])
    exact, exact_states = run_sequences(inputs, starts, initial, torch.float64)
    reference, reference_states = run_sequences(inputs, starts, initial, torch.float32)

    call = copies(inputs | {"state": state, "out": poisoned_like(inputs["x"])}, device)
    call |= copies({"cu_seqlens": starts_of(lengths), "num_accepted_tokens": int32(*accepted)}, device)
    call |= copies({"state_batch_indices": source}, device)
    if not in_place:
        call["dst_state_batch_indices"] = target.to(device)
    memory = Memory(call)
    out = vllm.selective_state_update(**call)
    assert out is call["out"]
    written = [
        (s, t, int(target[s, t])) for s in (0, 1, 2) for t in range(lengths[s]) if target[s, t] != NULL
    ]
    memory.assert_unchanged_but(out=None, state=[slot for _, _, slot in written])
    assert_state_step(out, reference.to(dtype), exact)
    for s, t, slot in written:
        assert_state_step(call["state"][slot], reference_states[s][t].to(dtype), exact_states[s][t])


def test_drafted_states_of_a_token_each(device: torch.device) -> None:
    """Without ``cu_seqlens`` each row is a sequence: one token, one state."""
    inputs = step_inputs(3, (10,), 8, torch.float32, False)
    state = randn(8, 10, 8, seed=52)
    initial = initial_states(state, [4, 2, 5])
    exact, exact_states = run_sequences(inputs, [0, 1, 2, 3], initial, torch.float64)
    reference, reference_states = run_sequences(inputs, [0, 1, 2, 3], initial, torch.float32)
    call = copies(inputs | {"state": state}, device)
    call |= copies({"state_batch_indices": int32([4, 0], [0, 2], [5, 0])}, device)
    call |= copies({"dst_state_batch_indices": int32([6, 0], [1, 0], [7, 0])}, device)
    memory = Memory(call)
    out = vllm.selective_state_update(**call, num_accepted_tokens=int32(1, 2, 0).to(device))
    memory.assert_unchanged_but(state=[6, 1, 7])
    assert_state_step(out, reference, exact)
    for s, slot in enumerate((6, 1, 7)):
        assert_state_step(call["state"][slot], reference_states[s][0], exact_states[s][0])


@pytest.mark.parametrize("lengths", [None, [2, 1, 3, 0, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_into_other_slots(
    place: str, device: torch.device, dtype: torch.dtype, lengths: list[int] | None
) -> None:
    """From the slots read into others, which may be each other's; nothing from or into a null block."""
    d, counts = {"cpu": 21, "interpreter": 10, "cuda": 528}[place], lengths or [1] * 5
    slots, targets = [5, 2, NULL, 4, 6], [2, 5, 1, 7, NULL]
    inputs = step_inputs(sum(counts), (d,), 16, dtype, True)
    state = randn(9, d, 16, seed=53, dtype=dtype)
    starts, initial = starts_of(counts).tolist(), initial_states(state, slots)
    exact, exact_states = run_sequences(inputs, starts, initial, torch.float64)
    reference, reference_states = run_sequences(inputs, starts, initial, torch.float32)
    if lengths is None:  # a padded row
        exact[2], reference[2] = 0, 0
    call = copies(inputs | {"state": state}, device)
    call |= copies(
        {"state_batch_indices": int32(*slots, 8), "dst_state_batch_indices": int32(*targets, 8)}, device
    )
    if lengths is not None:
        call["cu_seqlens"] = starts_of(lengths).to(device)
    memory = Memory(call)
    out = vllm.selective_state_update(**call)
    written = {0: 2, 1: 5} | ({3: 7} if lengths is None else {})
    memory.assert_unchanged_but(state=list(written.values()))
    assert_state_step(out, reference.to(dtype), exact)
    for s, slot in written.items():
        assert_state_step(call["state"][slot], reference_states[s][-1].to(dtype), exact_states[s][-1])


def test_states_of_the_first_slots_into_others() -> None:
    """Without slots to read, sequence s has slot s, slot 0 among them: it is no null block then."""
    inputs = step_inputs(2, (6,), 4, torch.float32, False)
    state = randn(4, 6, 4, seed=54)
    expected = state[:2].clone()
    y = vllm.selective_state_update(expected, **inputs)
    assert torch.equal(vllm.selective_state_update(state, **inputs, dst_state_batch_indices=int32(3, 2)), y)
    assert torch.equal(state[[3, 2]], expected)


@pytest.mark.parametrize("shape", [(0, 6), (2, 6)])
@pytest.mark.parametrize("drafted", [False, True])
def test_states_of_no_sequences(shape: tuple[int, int], drafted: bool) -> None:
    """No tokens, or tokens that no sequence holds: those rows of ``out`` stay as they are."""
    inputs = step_inputs(shape[0], (6,), 4, torch.float32, False)
    state, out = randn(4, 6, 4, seed=55), torch.ones(shape)
    before = state.clone()
    call = inputs | {"out": out, "cu_seqlens": int32(0), "state_batch_indices": int32()}
    call |= {"dst_state_batch_indices": int32()}
    if drafted:
        empty = torch.zeros(0, 2, dtype=torch.int32)
        call |= {
            "state_batch_indices": empty,
            "dst_state_batch_indices": empty,
            "num_accepted_tokens": int32(),
        }
    assert vllm.selective_state_update(state, **call) is out
    assert torch.equal(out, torch.ones(shape))
    assert torch.equal(state, before)


@pytest.mark.parametrize("order", ["0.33", "older", "keywords", "gate by position", "bias by position"])
def test_both_orders_of_gate_and_bias(order: str) -> None:
    inputs = step_inputs(3, (6,), 4, torch.float32, True)
    z, bias = inputs["z"], inputs["dt_bias"]
    call = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D")]
    expected_state, state = randn(4, 6, 4, seed=56), randn(4, 6, 4, seed=56)
    expected = selective_state_update_reference(expected_state, *call, z=z, dt_bias=bias, dt_softplus=True)
    arguments: tuple[list[Any], dict[str, Any]] = {
        "0.33": ([bias, z, True], {}),
        "older": ([z, bias, True], {}),
        "keywords": ([], {"z": z, "dt_bias": bias, "dt_softplus": True}),
        "gate by position": ([z], {"dt_bias": bias, "dt_softplus": True}),
        "bias by position": ([bias], {"z": z, "dt_softplus": True}),
    }[order]
    out = vllm.selective_state_update(state, *call, *arguments[0], **arguments[1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hint", [False, True])
def test_unused_keywords_pass_at_their_defaults_and_hints_at_any_value(hint: bool) -> None:
    inputs = step_inputs(2, (6,), 4, torch.float32, False)
    vllm.selective_state_update(
        randn(3, 6, 4, seed=57), **inputs, state_batch_indices=int32(1, 2), num_accepted_tokens=None, cu_seqlens=None,
        is_blackwell=hint, enable_stochastic_rounding=False, cache_philox_rounds=0,
    )  # fmt: skip
    x, weight = randn(2, 6, seed=58), randn(6, 4, seed=59)
    none = dict.fromkeys(("block_idx_last_scheduled_token", "initial_state_idx", "metadata"))
    vllm.causal_conv1d_update(
        x,
        randn(2, 6, 3, seed=60),
        weight,
        **none,
        validate_data=hint,
        retrieve_parent_token=None,
        pad_slot_id=-1,
    )
    vllm.causal_conv1d_fn(
        x.t(),
        weight,
        None,
        randn(1, 6, 3, seed=61),
        starts_of([2]),
        **none,
        block_size_to_align=0,
        validate_data=hint,
    )


def test_the_older_name_of_the_null_block() -> None:
    """``pad_slot_id=-1``: slot 0 is one like the others, and -1 pads."""
    x, weight = randn(3, 6, seed=62), randn(6, 4, seed=63)
    state = randn(2, 6, 3, seed=64)
    expected = state.clone()
    y = vllm.causal_conv1d_update(x[:2], expected, weight)
    slots = int32(0, 1, -1)
    out = vllm.causal_conv1d_update(x, state, weight, conv_state_indices=slots, pad_slot_id=-1)
    assert torch.equal(state, expected)
    assert torch.equal(out[:2], y)
    assert not out[2].any()
