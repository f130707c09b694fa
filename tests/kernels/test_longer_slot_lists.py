"""``cache_indices`` of a padded batch: longer than a packed batch has sequences, as vLLM and SGLang hand them over."""

from __future__ import annotations

import pytest
import torch
from call_form_testing import Memory, copies, randn, scan_inputs, starts_of

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn
from tp_mamba.kernels.selective_scan import selective_scan_fn

SLOTS = torch.tensor([3, 1, -1, 2], dtype=torch.int32)
"""Two sequences' slots, then padding, and a slot that belongs to nobody here."""


@pytest.mark.parametrize("column", [False, True])
def test_slots_beyond_the_sequences_are_ignored_by_the_scan(column: bool) -> None:
    inputs = scan_inputs(6, 5, n=4, dtype=torch.float32, seed=1)
    inputs |= {"B": randn(4, 5, seed=4), "C": randn(4, 5, seed=5), "query_start_loc": starts_of([3, 2])}
    inputs |= {"ssm_states": randn(5, 6, 4, seed=6), "has_initial_state": torch.tensor([True, False])}
    expected, call = copies(inputs, torch.device("cpu")), copies(inputs, torch.device("cpu"))
    y = selective_scan_fn(**expected, cache_indices=SLOTS[:2])
    memory = Memory(call)
    assert torch.equal(selective_scan_fn(**call, cache_indices=SLOTS[:, None] if column else SLOTS), y)
    assert torch.equal(call["ssm_states"], expected["ssm_states"])
    memory.assert_unchanged_but(ssm_states=[3, 1])


@pytest.mark.parametrize("column", [False, True])
def test_slots_beyond_the_sequences_are_ignored_by_the_convolution(column: bool) -> None:
    inputs = {"x": randn(6, 5, seed=1), "weight": randn(6, 4, seed=2), "query_start_loc": starts_of([3, 2])}
    inputs |= {"conv_states": randn(5, 6, 3, seed=3), "has_initial_state": torch.tensor([True, False])}
    expected, call = copies(inputs, torch.device("cpu")), copies(inputs, torch.device("cpu"))
    y = causal_conv1d_fn(**expected, cache_indices=SLOTS[:2])
    memory = Memory(call)
    assert torch.equal(causal_conv1d_fn(**call, cache_indices=SLOTS[:, None] if column else SLOTS), y)
    assert torch.equal(call["conv_states"], expected["conv_states"])
    memory.assert_unchanged_but(conv_states=[3, 1])
