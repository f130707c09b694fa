"""The causal convolution and its update: CPU path, interpreted kernel, and kernel on a GPU (marked gpu)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_conv1d_testing import double, randn, starts_of, token_major, weights
from conv_norm_testing import CPU, CUDA, INTERPRETER, assert_as_good, assert_same, poison, run_on

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference, causal_conv1d_update_reference

EVERYWHERE = [CPU, INTERPRETER, CUDA]
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (3, 0, 1, 70, 2, 0, 9)  # across the runs of a body program, at its edges, shorter than K - 1, empty


def check_packed(
    device: str, dtype: torch.dtype, K: int, bias: bool, activation: str | None, pad: int
) -> None:
    """Empty and short sequences, a null slot, unused slots, wide states, an output full of NaN."""
    D = 40
    T, S = sum(LENGTHS), len(LENGTHS)
    for state_len, state_dtype in ((K - 1, dtype), (K + 3, torch.float32)):
        x = token_major(T, D, dtype, device)
        weight, b = weights(D, K, bias, dtype, device)
        states = randn(S + 4, D, state_len, dtype=state_dtype, device=device)
        third = pad if state_len == K - 1 else 6  # with a null slot, and with none
        slots = torch.tensor([3, 4, third, 1, 9, 2, 5], dtype=torch.int32, device=device)
        initial = torch.tensor([1, 1, 1, 0, 1, 0, 0], dtype=torch.bool, device=device)
        common: dict[str, Any] = {"query_start_loc": starts_of(LENGTHS, device), "cache_indices": slots}
        common |= {"has_initial_state": initial, "pad_slot_id": pad}

        actual_states, in_dtype_states, exact_states = states.clone(), states.clone(), states.double()
        out = poison(torch.empty(T, D, dtype=dtype, device=device)).t()
        actual = causal_conv1d_fn(
            x, weight, b, activation=activation, conv_states=actual_states, out=out, **common
        )  # fmt: skip
        assert actual is out
        exact = causal_conv1d_reference(
            x.double(), weight.double(), double(b), activation, conv_states=exact_states, **common
        )  # fmt: skip
        in_dtype = causal_conv1d_reference(
            x, weight, b, activation, conv_states=in_dtype_states, **common
        )  # fmt: skip
        assert_as_good(actual, exact, in_dtype)
        # A state only moves inputs: exact. An empty sequence leaves its initial state (slot 4), zero without one
        # (slot 2). Unused slots stay as they were.
        assert torch.equal(actual_states, in_dtype_states)
        assert not actual_states[2].any()
        for slot in {*range(S + 4)} - {3, 1, 9, 2, 5} - ({third} - {pad}):
            assert torch.equal(actual_states[slot], states[slot])


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_packed_batch(where: str, dtype: torch.dtype, K: int) -> None:
    for bias, activation, pad in (
        (True, "silu", -1),
        (False, None, 0),
        *([(True, None, -1), (False, "swish", 0)] if dtype == torch.float32 else []),
    ):
        run_on(where, check_packed, dtype, K, bias, activation, pad)


def check_cuts(device: str, dtype: torch.dtype) -> None:
    """Cut everywhere (in float32), and token by token through the update: the same as whole."""
    D, K, L = 24, 4, 40
    x = token_major(L, D, dtype, device)
    weight, bias = weights(D, K, True, dtype, device)
    others = token_major(7, D, dtype, device)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)

    def states() -> torch.Tensor:
        return poison(torch.empty(3, D, K - 1, dtype=dtype, device=device))

    def piece(chunk: torch.Tensor, conv_states: torch.Tensor, initial: bool) -> torch.Tensor:
        """One chunk behind another, fresh sequence of the same packed batch."""
        packed = torch.cat([others, chunk], dim=1)
        out = causal_conv1d_fn(
            packed, weight, bias, activation="silu",
            query_start_loc=starts_of((others.shape[1], chunk.shape[1]), device),
            cache_indices=slots.flip(0), conv_states=conv_states,
            has_initial_state=torch.tensor([False, initial], device=device),
        )  # fmt: skip
        return out[:, others.shape[1] :]

    whole_states = states()
    whole = piece(x, whole_states, False)
    alone = causal_conv1d_fn(x.unsqueeze(0), weight, bias, activation="silu")
    assert_same(whole, alone[0])
    for cut in range(0, L + 1, 1 if dtype == torch.float32 else 5):
        cut_states = states()
        first = piece(x[:, :cut], cut_states, False)
        second = piece(x[:, cut:], cut_states, cut > 0)
        assert_same(torch.cat([first, second], dim=1), whole)
        assert torch.equal(cut_states[2], whole_states[2])

    step_states = states()
    step_states[2] = 0
    for t in range(L):
        step = causal_conv1d_update(x[:, t].unsqueeze(0), step_states, weight, bias, "silu", None, slots[:1])
        assert_same(step[0], whole[:, t])
    assert torch.equal(step_states[2], whole_states[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_cut_anywhere_is_the_same_as_whole(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_cuts, dtype)


def check_dense(device: str, dtype: torch.dtype, L: int) -> None:
    """The calls of causal-conv1d, channel-major and token-major, with states in and out."""
    B, D, K = 3, 24, 4
    weight, bias = weights(D, K, True, dtype, device)
    first = randn(B, D, K - 1, dtype=dtype, device=device)
    for x in (
        randn(B, D, L, dtype=dtype, device=device),
        randn(B, L, D, dtype=dtype, device=device).transpose(1, 2),
    ):
        for initial in (None, first):
            given = None if initial is None else torch.ones(B, dtype=torch.bool, device=device)
            final_exact = torch.zeros_like(first).double() if initial is None else first.double()
            final_right = torch.zeros_like(first) if initial is None else first.clone()
            exact = causal_conv1d_reference(
                x.double(), weight.double(), double(bias), "silu",
                conv_states=final_exact, has_initial_state=given,
            )  # fmt: skip
            in_dtype = causal_conv1d_reference(
                x, weight, bias, "silu", conv_states=final_right, has_initial_state=given
            )  # fmt: skip
            kept = None if initial is None else initial.clone()
            actual = causal_conv1d_fn(x, weight, bias, None, kept, activation="silu")
            assert_as_good(actual, exact, in_dtype)
            target = poison(torch.empty_like(first))
            again, final = causal_conv1d_fn(x, weight, bias, None, kept, True, target, "silu")
            assert final is target
            assert torch.equal(again, actual)
            assert torch.equal(final, final_right)
            assert torch.equal(
                causal_conv1d_fn(x, weight, bias, None, kept, True, activation="silu")[1], final
            )
            assert kept is None or torch.equal(kept, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_dense_batch_as_in_causal_conv1d(where: str, dtype: torch.dtype) -> None:
    for L in (0, 1, 3, 4, 67) if dtype == torch.float32 or where == "cuda" else (2, 9):
        run_on(where, check_dense, dtype, L)


def check_strides(device: str) -> None:
    """Whatever the strides of inputs, output and state, the same result."""
    T, D, K = 83, 24, 3
    x = token_major(T, D, torch.float32, device)
    weight, bias = weights(D, K, True, torch.float32, device)
    starts = starts_of((50, 0, 33), device)

    def call(
        x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        return causal_conv1d_fn(x, weight, bias, query_start_loc=starts, conv_states=states, out=out)

    states = torch.zeros(3, D, K - 1, device=device)
    expected = call(x, weight, states, None)
    assert expected.stride() == (1, D)
    wide = torch.zeros(3, 2 * D, 7, device=device)[:, ::2, 1:6]  # its last columns are used
    for out in (
        poison(torch.empty(D, T, device=device)),
        poison(torch.empty(T, 3 * D, device=device))[:, 5 : 5 + D].t(),
    ):
        for x_any in (x, x.contiguous(), x.repeat_interleave(2, 0)[::2]):
            wide.zero_()
            assert_same(call(x_any, weight.t().contiguous().t(), wide, poison(out)), expected)
            assert torch.equal(wide[..., -(K - 1) :], states)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_any_strides(where: str) -> None:
    run_on(where, check_strides)


def check_outside(device: str) -> None:
    x = token_major(70, 8, torch.float32, device)
    weight, _ = weights(8, 4, False, torch.float32, device)
    starts = torch.tensor([2, 6, 66], dtype=torch.int32, device=device)
    out = causal_conv1d_fn(x, weight, query_start_loc=starts, out=poison(torch.empty_like(x)))
    inside = causal_conv1d_fn(x[:, 2:66], weight, query_start_loc=starts - 2)
    assert_same(out[:, 2:66], inside)
    assert not out[:, :2].any()
    assert not out[:, 66:].any()


@pytest.mark.parametrize("where", EVERYWHERE)
def test_tokens_outside_all_sequences_give_zeros(where: str) -> None:
    run_on(where, check_outside)


def check_update(device: str, dtype: torch.dtype, K: int, L: int | None, pad: int) -> None:
    B, D = 5, 40
    for state_len in (K - 1, K + 2):
        shape = (B, D) if L is None else (B, D, L)
        x = randn(*shape, dtype=dtype, device=device)
        x[1] = float("nan")  # a padded row may hold anything
        weight, bias = weights(D, K, True, dtype, device)
        states = randn(8, D, state_len, dtype=dtype, device=device)
        slots = torch.tensor([7, pad, 2, 5, 4], dtype=torch.int32, device=device)
        actual_states, in_dtype_states, exact_states = states.clone(), states.clone(), states.double()
        out = poison(torch.empty_like(x))
        actual = causal_conv1d_update(
            x, actual_states, weight, bias, "silu", None, slots, pad_slot_id=pad, out=out
        )  # fmt: skip
        assert actual is out
        exact = causal_conv1d_update_reference(
            x.double(), exact_states, weight.double(), double(bias), "silu", slots, pad_slot_id=pad
        )  # fmt: skip
        in_dtype = causal_conv1d_update_reference(
            x, in_dtype_states, weight, bias, "silu", slots, pad_slot_id=pad
        )  # fmt: skip
        assert_as_good(actual, exact, in_dtype)
        assert not actual[1].any()
        assert torch.equal(actual_states, in_dtype_states)
        for slot in (0, 1, 3, 6):
            assert torch.equal(actual_states[slot], states[slot])
        # Without indices row b has slot b.
        rows = randn(*shape, dtype=dtype, device=device, seed=1)
        plain = causal_conv1d_update(rows, actual_states, weight, bias, "silu")
        named = torch.arange(B, dtype=torch.int32, device=device)
        assert torch.equal(
            plain, causal_conv1d_update(rows, in_dtype_states, weight, bias, "silu", None, named)
        )
        assert torch.equal(actual_states, in_dtype_states)


@pytest.mark.parametrize("L", [None, 1, 2, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_update(where: str, dtype: torch.dtype, L: int | None) -> None:
    for K, pad in ((2, 0), (3, -1), (4, 0)) if dtype == torch.float32 else ((4, -1),):
        run_on(where, check_update, dtype, K, L, pad)


def check_long_update(device: str) -> None:
    """Many tokens of each row at once, token-major: as in the other layout, and zeros for a padded row."""
    B, D, K, L = 3, 8, 4, 70
    x = randn(B, L, D, dtype=torch.float32, device=device).mT
    weight, bias = weights(D, K, True, x.dtype, device)
    states = randn(4, D, K - 1, dtype=x.dtype, device=device)
    slots = torch.tensor([3, -1, 0], dtype=torch.int32, device=device)
    other_states = states.clone()
    out = causal_conv1d_update(x, states, weight, bias, "silu", None, slots)
    other = causal_conv1d_update(x.contiguous(), other_states, weight, bias, "silu", None, slots)
    assert_same(out, other)
    assert torch.equal(states, other_states)
    assert not out[1].any()
    assert out[0].any(0).all()


@pytest.mark.parametrize("where", EVERYWHERE)
def test_update_of_many_tokens(where: str) -> None:
    run_on(where, check_long_update)


def check_large(device: str) -> None:
    """The real width, many runs, and addresses beyond 2**31 elements of a wider tensor."""
    D, K, T = 8192, 4, 140_000
    wide = torch.empty(T, 2 * D, dtype=torch.bfloat16, device=device)
    last = 200
    wide[-last:] = randn(last, 2 * D, dtype=torch.bfloat16, device=device)
    assert wide.numel() > 2**31
    weight, bias = weights(D, K, True, torch.bfloat16, device)
    starts = torch.tensor([0, T - last, T - 60, T - 60, T], dtype=torch.int32, device=device)
    out = causal_conv1d_fn(wide[:, D:].t(), weight, bias, activation="silu", query_start_loc=starts)
    shifted = starts[1:] - (T - last)
    tail = causal_conv1d_fn(wide[-last:, D:].t(), weight, bias, activation="silu", query_start_loc=shifted)
    assert torch.equal(out[:, -last:], tail)
    x, alone = wide[-60:, D:].t().unsqueeze(0), out[:, -60:].unsqueeze(0)
    exact = causal_conv1d_reference(x.double(), weight.double(), double(bias), "silu")
    assert_as_good(alone, exact, causal_conv1d_reference(x, weight, bias, "silu"))


@pytest.mark.parametrize("where", [CUDA])
def test_large_tensors(where: str) -> None:
    run_on(where, check_large)


def test_float64_is_computed_in_float64() -> None:
    x, weight = torch.randn(2, 6, 9, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    expected = torch.nn.functional.conv1d(x, weight.unsqueeze(1), padding=3, groups=6)[..., :9]
    torch.testing.assert_close(causal_conv1d_fn(x, weight), expected)


def test_operators_pass_opcheck() -> None:
    x, weight, bias = torch.randn(6, 9), torch.randn(6, 4), torch.randn(6)
    states, starts = torch.randn(3, 6, 3), torch.tensor([0, 4, 9], dtype=torch.int32)
    slots, initial = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([True, False])
    forward = torch.ops.tp_mamba.causal_conv1d.default
    arguments: tuple[Any, ...] = (weight, bias, states, starts, slots, initial, True, False, -1)
    torch.library.opcheck(forward, (torch.empty(6, 9), x, *arguments))
    dense = torch.randn(2, 6, 9)
    arguments = (weight, None, None, None, None, None, False, False, -1)
    torch.library.opcheck(forward, (torch.empty_like(dense), dense, *arguments))
    update = torch.ops.tp_mamba.causal_conv1d_update.default
    step = torch.randn(2, 6, 1)
    torch.library.opcheck(update, (torch.empty_like(step), step, states, weight, bias, True, slots, -1))


def test_compiles_as_one_graph() -> None:
    weight, bias = torch.randn(6, 4), torch.randn(6)
    starts, slots = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)

    def block(x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        y = causal_conv1d_fn(
            x, weight, bias, activation="silu",
            query_start_loc=starts, cache_indices=slots, conv_states=states,
        )  # fmt: skip
        return causal_conv1d_update(y[:, :2].t(), states, weight, bias, "silu", None, slots) * 2

    x, states = torch.randn(9, 6).t(), torch.randn(3, 6, 3)
    eager_states, compiled_states = states.clone(), states.clone()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, compiled_states), block(x, eager_states))
    assert_same(compiled_states, eager_states)
