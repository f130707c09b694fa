"""Calls of vLLM, mamba_ssm and causal-conv1d that are not supported: each sentence names what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from call_form_testing import starts_of
from call_forms import (
    vllm_causal_conv1d_fn,
    vllm_causal_conv1d_update,
    vllm_selective_scan_fn,
    vllm_selective_state_update,
)

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_state_update import selective_state_update

ROWS = torch.zeros(2, 6)
ONE = torch.ones(2, dtype=torch.int32)
TABLE = torch.ones(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cache_indices": TABLE},
            "cache_indices has shape [2, 3] but block tables are not supported; pass one slot",
        ),
        ({"initial_state_idx": ONE}, "initial_state_idx is not supported; for states at block boundaries"),
        ({"block_idx_last_scheduled_token": ONE}, "cut the sequences there and call once a piece"),
    ],
)
def test_refusals_of_the_scan_and_the_convolution(change: dict[str, Any], message: str) -> None:
    packed, starts, states = torch.zeros(6, 5), starts_of([3, 2]), torch.zeros(4, 6, 3)
    bc, conv = torch.zeros(3, 5), torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"^selective_scan_fn: ") as refusal:
        vllm_selective_scan_fn(
            packed, states, packed, torch.zeros(6, 3), bc, bc, query_start_loc=starts, **change
        )
    assert message in str(refusal.value)
    with pytest.raises(ValueError, match=r"^causal_conv1d_fn: ") as refusal:
        vllm_causal_conv1d_fn(packed, conv, None, states, starts, **change)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_batch_indices": TABLE}, "state_batch_indices has shape [2, 3] but block tables"),
        (
            {"num_accepted_tokens": ONE},
            "num_accepted_tokens is not supported; copy the state after each drafted",
        ),
        ({"dst_state_batch_indices": ONE}, "dst_state_batch_indices is not supported; copy the slots first"),
        ({"x": torch.zeros(2, 3, 2), "cu_seqlens": ONE}, "with cu_seqlens they must be [T, D]"),
        ({"dt": torch.zeros(3, 6), "cu_seqlens": ONE}, "dt has shape [3, 6] but [T, D] is [2, 6]"),
    ],
)
def test_refusals_of_the_state_update(change: dict[str, Any], message: str) -> None:
    call = {"state": torch.zeros(4, 6, 3), "x": ROWS, "dt": ROWS, "A": torch.zeros(6, 3)}
    call |= {"B": torch.zeros(2, 3), "C": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"^selective_state_update: ") as refusal:
        vllm_selective_state_update(**(call | change))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_state_indices": TABLE}, "conv_state_indices has shape [2, 3] but block tables"),
        (
            {"query_start_loc": ONE},
            "query_start_loc is not supported; call causal_conv1d_fn with x as [D, T]",
        ),
        (
            {"num_accepted_tokens": ONE},
            "num_accepted_tokens is not supported; copy the state after each drafted",
        ),
        ({"initial_state_idx": ONE}, "initial_state_idx is not supported; for states at block boundaries"),
    ],
)
def test_refusals_of_the_convolution_update(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^causal_conv1d_update: ") as refusal:
        vllm_causal_conv1d_update(ROWS, torch.zeros(4, 6, 3), torch.zeros(6, 4), **change)
    assert message in str(refusal.value)


def test_the_name_of_the_padding_slot_is_told() -> None:
    with pytest.raises(ValueError, match="null_block_id is not supported; it is called pad_slot_id here"):
        selective_state_update(
            torch.zeros(2, 6, 3), ROWS, ROWS, torch.zeros(6, 3), torch.zeros(2, 3), torch.zeros(2, 3),
            null_block_id=0,
        )  # fmt: skip


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
