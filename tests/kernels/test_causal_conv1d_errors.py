"""What the causal convolution refuses, and the sentence it says; runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

X, W = torch.zeros(2, 6, 9), torch.zeros(6, 4)
PACKED, STARTS = torch.zeros(6, 9), torch.tensor([0, 9], dtype=torch.int32)
STATES = torch.zeros(3, 6, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_idx": torch.zeros(2, 9)}, r"seq_idx is not supported: .* as query_start_loc, or call"),
        ({"activation": "gelu"}, r"the unknown activation 'gelu'; use \"silu\""),
        (
            {"weight": torch.zeros(6, 5)},
            r"weight \[6, 5\] has a convolution width K of 5 but K must be 2 to 4",
        ),
        ({"weight": torch.zeros(6, 1, 4)}, r"weight has shape \[6, 1, 4\]"),
        ({"weight": torch.zeros(7, 4)}, r"has 6 channels and weight 7"),
        ({"weight": W.long()}, r"weight has dtype torch.int64"),
        ({"weight": W.to("meta")}, r"weight is on meta but x is on cpu"),
        ({"x": PACKED}, r"x has shape \[6, 9\]: expected \[B, D, L\], or \[D, T\] with query_start_loc"),
        ({"query_start_loc": STARTS}, r"x has shape \[2, 6, 9\]: expected \[D, T\] with query_start_loc"),
        ({"x": X.long()}, r"x has dtype torch.int64: use float32"),
        ({"bias": torch.zeros(5)}, r"bias has shape \[5\]: expected \[6\]"),
        (
            {"out": torch.zeros(2, 6, 8)},
            r"out is torch.float32 \[2, 6, 8\]: expected the dtype and shape of x",
        ),
        (
            {"conv_states": torch.zeros(3, 6, 2)},
            r"conv_states has shape \[3, 6, 2\]: .* at least 3 past inputs",
        ),
        ({"conv_states": STATES[:1]}, r"conv_states has 1 slots for 2 sequences"),
        ({"conv_states": STATES, "return_final_states": True}, r"conv_states is read and written in place"),
        (
            {"initial_states": torch.zeros(1, 6, 3)},
            r"initial_states has shape \[1, 6, 3\]: expected \[2, 6, 3\]",
        ),
        (
            {"final_states_out": torch.zeros(2, 6, 3)},
            r"final_states_out was given without return_final_states",
        ),
        ({"cache_indices": torch.zeros(2, dtype=torch.int32)}, r"refer to conv_states, which is None"),
        (
            {"conv_states": STATES, "cache_indices": torch.zeros(3, dtype=torch.int32)},
            r"cache_indices has shape \[3\]: expected \[2\]",
        ),
        (
            {"conv_states": STATES, "has_initial_state": torch.zeros(2)},
            r"has_initial_state has dtype torch.float32 but must be bool",
        ),
        (
            {"conv_states": STATES, "cache_indices": torch.zeros(2, 2, dtype=torch.int32)[:, 0]},
            r"cache_indices has stride 2: pass a contiguous tensor",
        ),
        (
            {"x": PACKED, "query_start_loc": STARTS[:0]},
            r"query_start_loc has shape \[0\]: expected \[S \+ 1\]",
        ),
        ({"x": PACKED, "query_start_loc": STARTS.float()}, r"query_start_loc has dtype torch.float32"),
        ({"x": PACKED, "query_start_loc": STARTS.to("meta")}, r"query_start_loc is on meta but x is on cpu"),
    ],
)
def test_refuses_wrong_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d_fn(**{"x": X, "weight": W, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_seqlens": torch.zeros(2)}, r"cache_seqlens .* is not supported: keep a linear state"),
        ({"x": X[0, 0]}, r"x has shape \[9\]: expected \[B, D\] or \[B, D, L\]"),
        ({"conv_state": torch.zeros(3, 6, 2)}, r"conv_state has shape \[3, 6, 2\]"),
        ({"conv_state": STATES[:1]}, r"conv_state has 1 slots for 2 rows"),
        ({"conv_state_indices": torch.zeros(3, dtype=torch.int32)}, r"conv_state_indices has shape \[3\]"),
        ({"activation": "relu"}, r"unknown activation 'relu'"),
    ],
)
def test_update_refuses_wrong_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**{"x": X[..., 0], "conv_state": STATES, "weight": W, **arguments})
