"""Calls of vLLM, mamba_ssm and causal-conv1d that are not supported: each sentence names what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_form_testing import starts_of

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.compat import vllm
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_state_update import selective_state_update

ROWS = torch.zeros(2, 6)
ONE = torch.ones(2, dtype=torch.int32)
TABLE = torch.ones(2, 3, dtype=torch.int32)
A, BC, TAPS = torch.zeros(6, 3), torch.zeros(2, 3), torch.zeros(6, 4)


def scan(**change: Any) -> torch.Tensor:
    packed, bc = torch.zeros(6, 5), torch.zeros(3, 5)
    return vllm.selective_scan_fn(
        packed, torch.zeros(4, 6, 3), packed, A, bc, bc, query_start_loc=starts_of([3, 2]), **change
    )


def convolve(**change: Any) -> torch.Tensor:
    return vllm.causal_conv1d_fn(
        torch.zeros(6, 5), TAPS, None, torch.zeros(4, 6, 3), starts_of([3, 2]), **change
    )


def convolve_step(**change: Any) -> torch.Tensor:
    return vllm.causal_conv1d_update(
        **({"x": ROWS, "conv_state": torch.zeros(4, 6, 3), "weight": TAPS} | change)
    )


def step(**change: Any) -> torch.Tensor:
    call = {"state": torch.zeros(4, 6, 3), "x": ROWS, "dt": ROWS, "A": A, "B": BC, "C": BC}
    return vllm.selective_state_update(**(call | change))


def assert_refused(call: Callable[..., Any], op: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: ") as refusal:
        call(**change)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cache_indices": TABLE},
            "cache_indices has shape [2, 3] but block tables are not supported; pass one slot",
        ),
        ({"initial_state_idx": ONE}, "initial_state_idx is not supported; for states at block boundaries"),
        ({"block_idx_last_scheduled_token": ONE}, "cut the sequences there and call once"),
        ({"null_block_id": 0, "pad_slot_id": -1}, "null_block_id is 0 and pad_slot_id -1, two names"),
    ],
)
def test_refusals_of_the_scan_and_the_convolution(change: dict[str, Any], message: str) -> None:
    assert_refused(scan, "selective_scan_fn", change, message)
    assert_refused(convolve, "causal_conv1d_fn", change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_batch_indices": TABLE}, "state_batch_indices has shape [2, 3] but block tables"),
        ({"num_accepted_tokens": ONE}, "num_accepted_tokens was given without state_batch_indices"),
        (
            {"num_accepted_tokens": ONE[:1], "state_batch_indices": TABLE},
            "num_accepted_tokens has shape [1] but [S] is [2] here",
        ),
        (
            {"num_accepted_tokens": ONE, "state_batch_indices": TABLE, "dst_state_batch_indices": TABLE[:1]},
            "dst_state_batch_indices has shape [1, 3]: expected [S, M] with S = 2",
        ),
        (
            {"num_accepted_tokens": ONE, "state_batch_indices": TABLE, "z": ROWS[:1]},
            "z has shape [1, 6]: expected 2 rows, as x has",
        ),
        ({"dst_state_batch_indices": TABLE}, "dst_state_batch_indices has shape [2, 3] but block tables"),
        ({"dst_state_batch_indices": ONE[:1]}, "dst_state_batch_indices has shape [1] but [S] is [2] here"),
        ({"dst_state_batch_indices": ROWS[:, 0]}, "dst_state_batch_indices has dtype torch.float32"),
        ({"x": torch.zeros(2, 3, 2), "cu_seqlens": ONE}, "with cu_seqlens they must be [T, D]"),
        ({"dt": torch.zeros(3, 6), "cu_seqlens": ONE}, "dt has shape [3, 6] but [T, D] is [2, 6]"),
        ({"enable_stochastic_rounding": True}, "states are rounded to nearest here: keep them in float32"),
        ({"cache_philox_rounds": 4}, "cache_philox_rounds is not supported"),
        ({"bias_or_gate": ROWS, "z": ROWS}, "z was given twice, the second of shape [2, 6] by position"),
        ({"bias_or_gate": ROWS[0], "gate_or_bias": ROWS[0]}, "dt_bias was given twice"),
    ],
)
def test_refusals_of_the_state_update(change: dict[str, Any], message: str) -> None:
    assert_refused(step, "selective_state_update", change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_state_indices": TABLE}, "conv_state_indices has shape [2, 3] but block tables"),
        ({"query_start_loc": TABLE}, "query_start_loc [2, 3]: expected [T, D] and [S + 1]"),
        ({"query_start_loc": ONE, "x": ROWS[None]}, "x has shape [1, 2, 6] and query_start_loc [2]"),
        ({"num_accepted_tokens": ONE[:1]}, "num_accepted_tokens has shape [1] but [S] is [2] here"),
        ({"num_accepted_tokens": ROWS[:, 0]}, "num_accepted_tokens has dtype torch.float32"),
        (
            {"num_accepted_tokens": ONE, "x": torch.zeros(2, 6, 3)},
            "conv_state has shape [4, 6, 3]: expected [slots, D, state_len] with at least 5 columns",
        ),
        (
            {"num_accepted_tokens": ONE[:1], "query_start_loc": ONE},
            "max_query_len is -1: give the most tokens that a sequence has",
        ),
        ({"initial_state_idx": ONE}, "initial_state_idx is not supported; for states at block boundaries"),
        ({"retrieve_parent_token": TABLE}, "drafts are one token after another here, not a tree"),
    ],
)
def test_refusals_of_the_convolution_update(change: dict[str, Any], message: str) -> None:
    assert_refused(convolve_step, "causal_conv1d_update", change, message)


def test_an_unknown_keyword_is_a_type_error() -> None:
    for call in (scan, convolve, convolve_step, step):
        with pytest.raises(TypeError, match="unexpected keyword argument 'blocks'"):
            call(blocks=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null_block_id": 0}, "null_block_id is not supported; it is called pad_slot_id here"),
        ({"num_accepted_tokens": ONE}, "tp_mamba.kernels.compat.vllm"),
        ({"dst_state_batch_indices": ONE}, "tp_mamba.kernels.compat.vllm"),
    ],
)
def test_the_operator_says_where_its_foreign_form_is(change: dict[str, Any], message: str) -> None:
    call = {"state": torch.zeros(2, 6, 3), "x": ROWS, "dt": ROWS, "A": A, "B": BC, "C": BC}
    assert_refused(selective_state_update, "selective_state_update", call | change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_start_loc": ONE}, "tp_mamba.kernels.compat.vllm"),
        ({"num_accepted_tokens": ONE}, "tp_mamba.kernels.compat.vllm"),
        ({"cache_seqlens": ONE}, "tp_mamba.kernels.compat.causal_conv1d"),
    ],
)
def test_the_one_step_convolution_says_where_its_foreign_form_is(
    change: dict[str, Any], message: str
) -> None:
    call = {"x": ROWS, "conv_state": torch.zeros(2, 6, 3), "weight": TAPS}
    assert_refused(causal_conv1d_update, "causal_conv1d_update", call | change, message)


def test_complex_states_are_refused() -> None:
    x, real = torch.zeros(2, 6, 5), torch.zeros(6, 4)
    for change in ({"A": real + 0j}, {"B": real + 0j}, {"C": real + 0j}):
        with pytest.raises(ValueError, match=r"has dtype torch\.complex64: use float32"):
            selective_scan_fn(**({"u": x, "delta": x, "A": real, "B": real, "C": real} | change))


def test_cu_seqlens_is_told_where_to_go() -> None:
    x, real = torch.zeros(1, 6, 5), torch.zeros(6, 4)
    with pytest.raises(
        ValueError, match=r"cu_seqlens is not supported; pass \[0, .., T\] as query_start_loc"
    ):
        selective_scan_fn(x, x, real, real, real, cu_seqlens=torch.tensor([0, 2]))
    assert selective_scan_fn(x, x, real, real, real, cu_seqlens=None).shape == x.shape


def test_sequence_numbers_and_circular_states_are_refused() -> None:
    x, weight = torch.zeros(2, 6, 5), torch.zeros(6, 4)
    with pytest.raises(ValueError, match="seq_idx is not supported: pack the sequences along T and give"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"a circular state.* is not supported: keep a linear state"):
        causal_conv1d_update(x, torch.zeros(2, 6, 3), weight, cache_seqlens=torch.zeros(2, dtype=torch.int32))
