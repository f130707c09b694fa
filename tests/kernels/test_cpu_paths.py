"""What only the plain-torch paths do: they work a block of tokens at a time, and sequence after sequence."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from conv_norm_testing import assert_as_good
from kernel_testing import assert_within_twice, double, poisoned_like

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.causal_conv1d import cpu as causal_conv1d_cpu
from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference
from tp_mamba.kernels.selective_scan import cpu as selective_scan_cpu
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_scan.reference import selective_scan_reference
from tp_mamba.kernels.selective_state_update import selective_state_update

D = 40
LENGTHS = [47, 0, 20, 1, 5]
"""With blocks of 5 tokens and pieces of 20: ragged and whole, none, one piece, one token, one block."""
SLOTS = [3, 0, 5, 1, -1]
"""The slot of each sequence, among seven; the last sequence has none."""
INITIAL = [True, True, False, False, False]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scan_inputs(n: int, lengths: list[int], groups: int = 1) -> dict[str, Any]:
    g, tokens = generator(n + groups), sum(lengths)
    return {
        "u": torch.randn(tokens, D, generator=g).t(),
        "delta": torch.rand(tokens, D, generator=g).t(),
        "A": -torch.exp(torch.rand(n, D, generator=g) * 4 - 1).t(),
        "B": torch.randn(tokens, groups, n, generator=g).permute(1, 2, 0),
        "C": torch.randn(tokens, groups, n, generator=g).permute(1, 2, 0),
        "D": torch.randn(D, generator=g),
        "z": torch.randn(tokens, D, generator=g).t(),
        "query_start_loc": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
    }


def conv_inputs(lengths: list[int], K: int = 4) -> dict[str, Any]:
    g = generator(K)
    return {
        "x": torch.randn(sum(lengths), D, generator=g).t(),
        "weight": torch.randn(D, K, generator=g),
        "bias": torch.randn(D, generator=g),
        "activation": "silu",
        "query_start_loc": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
    }


def slots(states: torch.Tensor, name: str) -> dict[str, Any]:
    return {
        name: states,
        "cache_indices": torch.tensor(SLOTS, dtype=torch.int32),
        "has_initial_state": torch.tensor(INITIAL),
    }


@pytest.mark.filterwarnings("error")  # torch warns of an output that it has to resize
@pytest.mark.parametrize(("n", "groups"), [(16, 1), (16, 2), (40, 1)])
def test_scan_across_blocks_and_pieces(n: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """States summed by a product and, above MATMUL_STATES, one by one; channels in groups."""
    monkeypatch.setattr(selective_scan_cpu, "_BLOCK_ELEMENTS", 5 * n * D)
    assert selective_scan_cpu._PIECE == 4
    inputs, states = scan_inputs(n, LENGTHS, groups), torch.randn(7, n, D, generator=generator(1)).mT
    ours, in_dtype, exact = states.clone(), states.clone(), states.double()
    out = selective_scan_fn(**inputs, **slots(ours, "ssm_states"), out=poisoned_like(inputs["u"]))
    reference, _ = selective_scan_reference(**inputs, **slots(in_dtype, "ssm_states"))
    double_out, _ = selective_scan_reference(**double(inputs), **slots(exact, "ssm_states"))
    assert isinstance(out, torch.Tensor)
    assert_within_twice(out, reference, double_out)
    for slot in (3, 5, 1):
        assert_within_twice(ours[slot], in_dtype[slot], exact[slot])
    for slot in (0, 2, 4, 6):  # without tokens, and not named
        assert torch.equal(ours[slot], states[slot])


def test_scan_writes_over_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is read before it is written over, whichever input the output is."""
    monkeypatch.setattr(selective_scan_cpu, "_BLOCK_ELEMENTS", 5 * 16 * D)
    inputs = scan_inputs(16, [47])
    expected = selective_scan_fn(**inputs)
    for name in ("u", "delta", "z"):
        over = inputs | {name: inputs[name].clone()}
        assert torch.equal(selective_scan_fn(**over, out=over[name]), expected)


@pytest.mark.parametrize("n", [16, 40])
def test_scan_of_a_sequence_does_not_depend_on_its_neighbours(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selective_scan_cpu, "_BLOCK_ELEMENTS", 5 * n * D)
    inputs = scan_inputs(n, LENGTHS)
    together, last = selective_scan_fn(**inputs, return_last_state=True)
    for s, stop in enumerate(accumulate(LENGTHS)):
        part = slice(stop - LENGTHS[s], stop)
        own = {name: inputs[name][..., part] for name in ("u", "delta", "B", "C", "z")}
        own["query_start_loc"] = torch.tensor([0, LENGTHS[s]], dtype=torch.int32)
        alone, state = selective_scan_fn(**inputs | own, return_last_state=True)
        assert torch.equal(alone, together[:, part])
        assert torch.equal(state[0], last[s])


@pytest.mark.parametrize("K", [2, 4])
def test_convolution_across_blocks(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_conv1d_cpu, "_BLOCK_ELEMENTS", 5 * D)
    inputs, states = conv_inputs(LENGTHS, K), torch.randn(7, K - 1, D, generator=generator(1)).mT
    ours = states.clone()
    out = causal_conv1d_fn(**inputs, **slots(ours, "conv_states"), out=poisoned_like(inputs["x"]))
    reference = causal_conv1d_reference(**inputs, **slots(states.clone(), "conv_states"))
    exact = causal_conv1d_reference(**double(inputs), **slots(states.double(), "conv_states"))
    assert isinstance(out, torch.Tensor)
    assert_as_good(out, exact, reference)
    for s, slot in enumerate(SLOTS[:4]):  # the last inputs, after what the slot held or zeros
        before = states[slot] if INITIAL[s] else torch.zeros(D, K - 1)
        mine = inputs["x"][:, sum(LENGTHS[:s]) : sum(LENGTHS[: s + 1])]
        assert torch.equal(ours[slot], torch.cat([before, mine], 1)[:, -(K - 1) :])
    for slot in (2, 4, 6):
        assert torch.equal(ours[slot], states[slot])


def test_convolution_of_a_sequence_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_conv1d_cpu, "_BLOCK_ELEMENTS", 5 * D)
    inputs = conv_inputs(LENGTHS)
    together = causal_conv1d_fn(**inputs)
    assert isinstance(together, torch.Tensor)
    for s, stop in enumerate(accumulate(LENGTHS)):
        part = slice(stop - LENGTHS[s], stop)
        starts = torch.tensor([0, LENGTHS[s]], dtype=torch.int32)
        alone = causal_conv1d_fn(**inputs | {"x": inputs["x"][:, part], "query_start_loc": starts})
        assert torch.equal(alone, together[:, part])


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_without_tokens_set_both_states_alike(packed: bool) -> None:
    """No token, no initial state: the state before the first token is zero. An initial state stays."""
    ssm, conv = torch.randn(7, D, 16, generator=generator(2)), torch.randn(7, D, 3, generator=generator(3))
    initial = torch.tensor([True, False, False])
    common = {
        "cache_indices": torch.tensor([4, 2, -1], dtype=torch.int32),
        "has_initial_state": initial,
    }
    x, BC = (
        (torch.empty(D, 0), torch.empty(16, 0)) if packed else (torch.empty(3, D, 0), torch.empty(3, 16, 0))
    )
    starts = torch.zeros(4, dtype=torch.int32) if packed else None
    ours = ssm.clone(), conv.clone()
    A, weight = -torch.ones(D, 16), torch.ones(D, 4)
    selective_scan_fn(x, x, A, BC, BC, query_start_loc=starts, ssm_states=ours[0], **common)
    causal_conv1d_fn(x, weight, query_start_loc=starts, conv_states=ours[1], **common)
    for mine, before in zip(ours, (ssm, conv), strict=True):
        assert not mine[2].any()
        kept = [0, 1, 3, 4, 5, 6]
        assert torch.equal(mine[kept], before[kept])


def test_an_update_of_no_rows_changes_nothing() -> None:
    ssm, conv = torch.randn(3, D, 16, generator=generator(4)), torch.randn(3, D, 3, generator=generator(5))
    ours, none, BC = (ssm.clone(), conv.clone()), torch.empty(0, D), torch.empty(0, 16)
    slots = torch.empty(0, dtype=torch.int32)
    y = selective_state_update(ours[0], none, none, -torch.ones(D, 16), BC, BC, state_batch_indices=slots)
    u = causal_conv1d_update(none, ours[1], torch.ones(D, 4), conv_state_indices=slots)
    assert y.shape == u.shape == (0, D)
    assert torch.equal(ours[0], ssm)
    assert torch.equal(ours[1], conv)
