"""vLLM's calls of the four operators: its layouts, slots and padding, results in place, against float64.

The sizes follow its tests on a GPU and are small elsewhere.
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
    ssm_parameters,
    starts_of,
    step_inputs,
    tie_heads,
)
from conv_norm_testing import run_on
from kernel_testing import assert_within_twice, double, poisoned_like

from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference, causal_conv1d_update_reference
from tp_mamba.kernels.compat import vllm
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_scan.reference import selective_scan_reference
from tp_mamba.kernels.selective_state_update.reference import selective_state_update_reference


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(place: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return device_of(place, monkeypatch)


# ---------------------------------------------------------------------------------------------------------- the scan


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "groups", "gate"),
    [(torch.float32, 1, True), (torch.bfloat16, 2, True), (torch.float32, 2, False)],
)
def test_scan_of_a_dense_batch_in_chunks(
    place: str, device: torch.device, dtype: torch.dtype, groups: int, gate: bool, chunks: int
) -> None:
    """``[B, D, L]`` cut in chunks, the state carried in the inputs' dtype; nothing is read of it at first."""
    batch, d, n = 2, 36, 8
    length = {"cpu": 67, "interpreter": 13, "cuda": 4096}[place]
    inputs = scan_inputs(batch, d, length, n=n, dtype=dtype, gate=gate, seed=1)
    bc = (batch, n, length) if groups == 1 else (batch, groups, n, length)
    inputs |= {"B": randn(*bc, seed=4, dtype=dtype), "C": randn(*bc, seed=5, dtype=dtype)}
    exact_out, exact_state = selective_scan_reference(**double(inputs))

    by_token = ("u", "delta", "B", "C", "z")
    cuts = [length // chunks * c for c in range(chunks)] + [length]
    reference_state = torch.full((batch, d, n), float("nan"), dtype=dtype, device=device)
    state = reference_state.clone()
    outs, references = [], []
    for start, stop in pairwise(cuts):
        initial = torch.ones(batch, dtype=torch.bool) if start else None
        piece = {k: v[..., start:stop] if k in by_token and v is not None else v for k, v in inputs.items()}
        reference, _ = reference_scan(
            piece | {"has_initial_state": initial}, device, ssm_states=reference_state
        )
        references.append(reference)
        call = copies(piece | {"has_initial_state": initial}, device) | {"ssm_states": state}
        memory, target = Memory(call), call["z" if gate else "delta"]
        with Work() as work:
            out = vllm.selective_scan_fn(**call)
        assert not work.operators
        assert out is target
        memory.assert_unchanged_but(**{"z" if gate else "delta": None, "ssm_states": None})
        outs.append(out)
    assert_within_twice(torch.cat(outs, -1), torch.cat(references, -1), exact_out)
    assert_within_twice(state, reference_state, exact_state)


@pytest.mark.parametrize("null_block_id", [0, -1])
@pytest.mark.parametrize(
    ("dtype", "groups", "gate"),
    [(torch.float32, None, True), (torch.float32, 2, False), (torch.bfloat16, 1, True)],
)
def test_scan_of_packed_sequences(
    place: str, device: torch.device, dtype: torch.dtype, groups: int | None, gate: bool, null_block_id: int
) -> None:
    """``[D, T]`` with slots in any order, padding between and after the sequences, some of them continuing."""
    d, n = 36, 8
    longest = {"cpu": 40, "interpreter": 6, "cuda": 3000}[place]
    lengths = [longest, 1, 3, 17 if longest > 17 else 2, 2]
    slots = torch.tensor([7, null_block_id, 3, 9, null_block_id], dtype=torch.int32)
    inputs = scan_inputs(d, sum(lengths), n=n, dtype=dtype, gate=gate, seed=11)
    bc = (n, sum(lengths)) if groups is None else (groups, n, sum(lengths))
    inputs |= {"B": randn(*bc, seed=14, dtype=dtype), "C": randn(*bc, seed=15, dtype=dtype)}
    inputs |= {
        "query_start_loc": starts_of(lengths),
        "cache_indices": slots,
        "has_initial_state": torch.tensor([True, True, False, True, False]),
    }
    states = randn(11, d, n, seed=16, dtype=dtype)
    reference_states, exact_states = states.to(device, copy=True), states.double()
    pad = {"pad_slot_id": null_block_id}
    exact, _ = selective_scan_reference(**double(inputs), **pad, ssm_states=exact_states)
    reference, _ = reference_scan(inputs, device, **pad, ssm_states=reference_states)

    call = copies(inputs | {"ssm_states": states}, device)
    memory = Memory(call)
    with Work() as work:
        out = vllm.selective_scan_fn(**call, null_block_id=null_block_id)
    assert not work.operators
    used = [7, 3, 9]
    memory.assert_unchanged_but(**{"z" if gate else "delta": None}, ssm_states=used)
    assert_within_twice(out, reference, exact)
    assert_within_twice(call["ssm_states"][used], reference_states[used], exact_states[used])


def mixer_call(lengths: list[int], d: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """The views that a mixer of vLLM hands to the scan: all of them of token-major memory, transposed."""
    t, rank = sum(lengths), 5
    parameters = ssm_parameters((d,), n, 21)
    projected = randn(t, rank + 2 * n, seed=22, dtype=dtype)  # x_proj's output: dt, B, C
    xz = randn(t, 2 * d, seed=23, dtype=dtype)
    return {
        "u": randn(t, d, seed=24, dtype=dtype).t(),
        "delta": randn(t, d, seed=25, dtype=dtype).t(),
        "A": parameters["A"],
        "B": projected[:, rank : rank + n].t(),
        "C": projected[:, rank + n :].t(),
        "D": parameters["D"],
        "z": xz.t().chunk(2, dim=-2)[1],
        "delta_bias": parameters["bias"],
        "delta_softplus": True,
        "query_start_loc": starts_of(lengths),
    }


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_scan_as_the_mixer_calls_it(place: str, device: torch.device, state_dtype: torch.dtype) -> None:
    """Over the gate, half of in_proj's output, whose other half stays; slots as a column of a block table."""
    d = {"cpu": 40, "interpreter": 33, "cuda": 2064}[place]
    lengths = {"cpu": [30, 1, 9], "interpreter": [5, 1, 2], "cuda": [700, 1, 300]}[place]
    inputs = mixer_call(lengths, d, 16, torch.bfloat16)
    inputs["has_initial_state"] = torch.tensor([True, False, True])
    states = randn(8, d, 16, seed=26, dtype=state_dtype)
    slots = torch.tensor([6, 2, 5], dtype=torch.int32)
    reference_states, exact_states = states.to(device, copy=True), states.double()
    exact, _ = selective_scan_reference(**double(inputs), cache_indices=slots, ssm_states=exact_states)
    reference, _ = reference_scan(inputs | {"cache_indices": slots}, device, ssm_states=reference_states)

    used = [6, 2, 5]
    table = torch.stack([slots, torch.tensor([1, 1, 1], dtype=torch.int32)], 1).to(device)
    for indices, copied in ((slots.to(device), 0), (slots[:, None].to(device), 0), (table[:, 0], 12)):
        call = copies(inputs | {"ssm_states": states}, device)
        memory = Memory(call)
        with Work() as work:
            out = vllm.selective_scan_fn(**call, cache_indices=indices)
        assert work.bytes_written == copied  # the three slots, of a strided column only
        memory.assert_unchanged_but(z=None, ssm_states=used)
        assert_within_twice(out, reference, exact)
        assert_within_twice(call["ssm_states"][used], reference_states[used], exact_states[used])


def test_packed_sequences_with_constant_b(device: torch.device) -> None:
    """``B [D, N]`` as a view ``[D, N, T]`` beside C of one group: neither is copied."""
    inputs = mixer_call([5, 1, 3], 36, 8, torch.float32)
    constant = randn(36, 8, seed=27)
    inputs["B"] = constant[..., None].expand(-1, -1, 9)
    exact, _ = selective_scan_reference(**double(inputs))
    reference, _ = selective_scan_reference(**inputs)
    call = copies(inputs, device)
    with Work() as work:
        out = selective_scan_fn(**call)
    assert not work.operators
    assert isinstance(out, torch.Tensor)
    assert_within_twice(out, reference, exact)


@pytest.mark.parametrize("over", ["u", "delta", "z"])
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_the_scan_may_write_over_an_input(place: str, device: torch.device, over: str, layout: str) -> None:
    """``out`` that is ``u``, ``delta`` or ``z``: the bits of a separate result, also with several warps per program."""
    n, lengths = {
        # The CPU path takes channels in blocks of 2**20 elements with their states and tokens: here, in two.
        "cpu": (16, [50, 14]),
        "interpreter": (24, [9, 2]),
        "cuda": (64, [700, 33]),
    }[place]
    inputs = mixer_call(lengths, {"cpu": 1030, "interpreter": 35, "cuda": 200}[place], n, torch.float32)
    if layout == "channels":
        inputs |= {k: inputs[k].contiguous() for k in ("u", "delta", "z", "B", "C")}
    call = copies(inputs, device)
    expected = selective_scan_fn(**call)
    memory = Memory(call)
    out = selective_scan_fn(**call, out=call[over])
    assert out is call[over]
    memory.assert_unchanged_but(**{over: None})
    assert torch.equal(out, expected)


# -------------------------------------------------------------------------------------------------- the state update


def update(**call: Any) -> torch.Tensor:
    """vLLM's call: the slots to read, and the same once more to write."""
    return vllm.selective_state_update(**call, dst_state_batch_indices=call.get("state_batch_indices"))


@pytest.mark.parametrize("padding", [None, 0, 5])
@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, False), (torch.bfloat16, True)])
def test_state_update(
    place: str, device: torch.device, dtype: torch.dtype, gate: bool, n: int, padding: int | None
) -> None:
    """States in the inputs' dtype, B and C in float32; with slots and null blocks, or without."""
    d = {"cpu": 37, "interpreter": 20, "cuda": 528}[place]
    inputs = step_inputs(3 + (padding or 0), (d,), n, dtype, gate)
    if padding is not None:
        inputs["state_batch_indices"] = torch.tensor([13, 4, 8] + [0] * padding, dtype=torch.int32)
    check_step(update, inputs, randn(15, d, n, seed=37, dtype=dtype), device, 0, gives_out=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_state_update_with_heads(place: str, device: torch.device, groups: int, tied: bool) -> None:
    heads, d, n = 4, {"cpu": 9, "interpreter": 6, "cuda": 64}[place], 16
    inputs = step_inputs(3, (heads, d), n, torch.bfloat16, True, groups)
    if tied:
        inputs = tie_heads(inputs)
    inputs["state_batch_indices"] = torch.tensor([5, 1, 2], dtype=torch.int32)
    state = randn(7, heads, d, n, seed=43, dtype=torch.bfloat16)
    check_step(update, inputs, state, device, 0, gives_out=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [None, [4, 2, 0, 5]])
def test_state_update_of_several_tokens(
    place: str, device: torch.device, slots: list[int] | None, dtype: torch.dtype
) -> None:
    """``cu_seqlens``: a few successive rows per sequence, as in as many calls; a null block among the sequences."""
    d, n = {"cpu": 37, "interpreter": 20, "cuda": 528}[place], 16
    lengths = [1, 4, 2, 3]
    inputs = step_inputs(sum(lengths), (d,), n, dtype, True)
    state = randn(8, d, n, seed=51, dtype=dtype)
    call = copies(inputs | {"state": state, "out": poisoned_like(inputs["x"])}, device)
    call["cu_seqlens"] = starts_of(lengths).to(device)
    if slots is not None:
        call["state_batch_indices"] = torch.tensor(slots, dtype=torch.int32, device=device)
    memory = Memory(call)
    with Work() as work:
        out = update(**call)
    assert out is call["out"]
    assert work.bytes_written <= 2 * len(lengths)  # "every sequence starts from its slot"
    used = [slot for slot in slots or range(4) if slots is None or slot != 0]
    memory.assert_unchanged_but(out=None, state=used)

    # The states go on in float32 between the tokens of a call.
    exact_state, reference_state = state.double(), state.float()
    exact, reference = torch.zeros(out.shape, dtype=torch.float64), torch.zeros(out.shape)
    offsets = starts_of(lengths).tolist()
    for s, slot in enumerate(slots or range(4)):
        if slots is not None and slot == 0:
            exact_state[slot], reference_state[slot] = 0, 0  # such a sequence starts from zero
        for t in range(offsets[s], offsets[s + 1]):
            row = {k: v[t : t + 1] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
            row["state_batch_indices"] = torch.tensor([slot])
            exact[t] = selective_state_update_reference(exact_state, **double(row))[0]
            wide = {
                k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in row.items()
            }
            reference[t] = selective_state_update_reference(reference_state, **wide)[0]
    assert_within_twice(out, reference.to(dtype), exact)
    assert_within_twice(call["state"][used], reference_state[used].to(dtype), exact_state[used])


# --------------------------------------------------------------------------------------------------- the convolution


def conv_parameters(d: int, k: int, bias: bool, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    return {
        "weight": randn(d, k, seed=61, dtype=dtype),
        "bias": randn(d, seed=62, dtype=dtype) if bias else None,
    }


def check_packed_convolution(
    device: str, place: str, dtype: torch.dtype, k: int, bias: bool, activation: str | bool | None, null: int
) -> None:
    d = {"cpu": 40, "interpreter": 33, "cuda": 4096}[place]
    lengths = {"cpu": [40, 1, 2, 9, 3], "interpreter": [10, 1, 2, 5, 3], "cuda": [3000, 1, 2, 249, 3]}[place]
    inputs: dict[str, Any] = {
        "x": randn(sum(lengths), 16 + d + 8, seed=63, dtype=dtype)[:, 16 : 16 + d].t(),
        **conv_parameters(d, k, bias, dtype),
        "query_start_loc": starts_of(lengths),
        "cache_indices": torch.tensor([7, null, 3, 9, null], dtype=torch.int32),
        "has_initial_state": torch.tensor([True, True, True, False, False]),
    }
    longer = randn(11, k + 1, d, seed=64, dtype=dtype).transpose(1, 2)
    for states in (longer[..., : k - 1].transpose(1, 2).contiguous().transpose(1, 2), longer):
        reference_states, exact_states = states[..., : k - 1].clone(), states[..., : k - 1].double()
        common = inputs | {"activation": "silu" if activation else None, "pad_slot_id": null}
        exact = causal_conv1d_reference(**double(common), conv_states=exact_states)
        reference = causal_conv1d_reference(**common, conv_states=reference_states)

        call = copies(inputs | {"conv_states": states}, torch.device(device))
        memory = Memory(call)
        with Work() as work:
            out = vllm.causal_conv1d_fn(**call, activation=activation, null_block_id=null)
        assert not work.operators
        memory.assert_unchanged_but(conv_states=[7, 3, 9])
        assert_within_twice(out, reference, exact)
        assert out.stride() == (1, d)
        assert torch.equal(call["conv_states"][..., : k - 1].cpu(), reference_states)
        assert torch.equal(call["conv_states"][..., k - 1 :].cpu(), states[..., k - 1 :])


@pytest.mark.parametrize("null_block_id", [0, -1])
@pytest.mark.parametrize(
    ("dtype", "k", "bias", "activation"),
    [
        (torch.bfloat16, 4, True, "silu"),
        (torch.bfloat16, 4, False, True),
        (torch.float32, 3, True, None),
        (torch.float32, 2, True, "swish"),
    ],
)
def test_convolution_of_packed_sequences(
    place: str, dtype: torch.dtype, k: int, bias: bool, activation: str | bool | None, null_block_id: int
) -> None:
    """Channels of wider rows, states with channels contiguous too, padding, and states two columns too long."""
    run_on(place, check_packed_convolution, place, dtype, k, bias, activation, null_block_id)


def check_convolution_update(
    device: str,
    place: str,
    dtype: torch.dtype,
    k: int,
    length: int | None,
    bias: bool,
    activation: str | bool | None,
) -> None:
    d = {"cpu": 40, "interpreter": 33, "cuda": 2064}[place]
    for padding in (0, 5):
        x = randn(3 + padding, length or 1, d, seed=71, dtype=dtype)
        inputs: dict[str, Any] = {
            "x": x[:, 0] if length is None else x.transpose(1, 2),
            **conv_parameters(d, k, bias, dtype),
            "conv_state_indices": torch.tensor([13, 4, 8] + [-1] * padding, dtype=torch.int32),
        }
        states = randn(15, k - 1, d, seed=72, dtype=dtype).transpose(1, 2)
        reference_states, exact_states = states.clone(), states.double()
        common = inputs | {"activation": "silu" if activation else None}
        exact = causal_conv1d_update_reference(**double(common), conv_state=exact_states)
        reference = causal_conv1d_update_reference(**common, conv_state=reference_states)

        call = copies(inputs | {"conv_state": states}, torch.device(device))
        memory = Memory(call)
        with Work() as work:
            out = vllm.causal_conv1d_update(**call, activation=activation, null_block_id=-1)
        assert not work.operators
        memory.assert_unchanged_but(conv_state=[13, 4, 8])
        assert_within_twice(out, reference, exact)
        assert not out[3:].any()
        assert torch.equal(call["conv_state"].cpu(), reference_states)


@pytest.mark.parametrize(
    ("dtype", "k", "length", "bias", "activation"),
    [
        (torch.bfloat16, 4, None, True, "silu"),
        (torch.bfloat16, 4, 1, False, True),
        (torch.float32, 3, 3, True, None),
        (torch.float32, 4, 5, True, "silu"),
    ],
)
def test_convolution_update(
    place: str, dtype: torch.dtype, k: int, length: int | None, bias: bool, activation: str | bool | None
) -> None:
    """Rows ``[B, D]`` or ``[B, D, L]`` with channels contiguous, into slots in any order; padded rows give zeros."""
    run_on(place, check_convolution_update, place, dtype, k, length, bias, activation)
