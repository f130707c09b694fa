"""A state that does not fit the mixer or the batch is refused before anything is read, written or communicated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tp_mamba.batch import NULL_SLOT, MambaMetadata, MambaMetadataBuilder
from tp_mamba.mixer import MambaMixer, MambaState
from tp_mamba.parallel.communicate import counted
from tp_mamba.parallel.group import TensorParallel


def make_mixer(tp: TensorParallel | None = None) -> MambaMixer:
    torch.manual_seed(0)
    return MambaMixer(6, 4, 3, 10, 2, True, False, False, prefix="m", tp=tp)


def make_state(slots: int = 3) -> MambaState:
    return MambaState(torch.randn(slots, 2, 10).mT, torch.randn(slots, 4, 10).mT)


WRONG: dict[str, tuple[Callable[[MambaState], MambaState], str]] = {
    "fewer conv slots": (
        lambda s: MambaState(s.conv_state[:1], s.ssm_state),
        r"ssm_state has shape \[3, 10, 4\]",
    ),
    "fewer ssm slots": (
        lambda s: MambaState(s.conv_state, s.ssm_state[:1]),
        r"ssm_state has shape \[1, 10, 4\]",
    ),
    "ssm of another size": (
        lambda s: MambaState(s.conv_state, torch.zeros(3, 10, 5)),
        r"ssm_state has shape \[3, 10, 5\], it must be \[3, 10, 4\]",
    ),
    "conv of another width": (
        lambda s: MambaState(torch.zeros(3, 10, 3), s.ssm_state),
        r"conv_state has shape \[3, 10, 3\], it must be \[3, 10, 2\]",
    ),
    "parts exchanged": (
        lambda s: MambaState(s.ssm_state, s.conv_state),
        r"conv_state has shape \[3, 10, 4\]",
    ),
    "no dimensions": (lambda s: MambaState(torch.tensor(0.0), s.ssm_state), r"conv_state has shape \[\]"),
    "integers": (lambda s: MambaState(s.conv_state, s.ssm_state.long()), "ssm_state is in torch.int64"),
    "elsewhere": (
        lambda s: MambaState(s.conv_state, s.ssm_state.to("meta")),
        "ssm_state is on meta and the hidden states on cpu",
    ),
}


def batches() -> dict[str, MambaMetadata]:
    build = MambaMetadataBuilder("cpu").build
    prefill = {"prefill_slots": [1], "prefill_lengths": [2], "has_initial_states": [True]}
    return {"decode": build(decode_slots=[0, 2]), "prefill": build(**prefill)}


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_part_is_refused_before_the_other_moves(wrong: str, kind: str) -> None:
    change, message = WRONG[wrong]
    mixer, state = make_mixer(TensorParallel.virtual(0, 1)), make_state()
    given = change(state)
    before = [part.clone() for part in given if not part.is_meta]
    with pytest.raises(ValueError, match=f"m: {message}"):
        mixer(torch.zeros(2, 6), batches()[kind], given)
    for part, was in zip((part for part in given if not part.is_meta), before, strict=True):
        assert torch.equal(part, was)


@pytest.mark.parametrize(
    ("rows", "slot", "message"),
    [(2, 3, "names slot 3 of a state with 3 slots"), (1, 0, "has 1 rows but the metadata describes 2")],
)
def test_no_collective_runs_for_a_batch_that_does_not_fit(rows: int, slot: int, message: str) -> None:
    tp = TensorParallel.virtual(1, 2)
    mixer = make_mixer(tp)
    (D, window), (_, N) = mixer.get_state_shape()
    state = MambaState(torch.randn(3, D, window), torch.randn(3, D, N))
    before = [part.clone() for part in state]
    batch = MambaMetadataBuilder("cpu").build(decode_slots=[slot, 1])
    with counted(tp) as traffic, pytest.raises(ValueError, match=message):
        mixer(torch.zeros(rows, 6), batch, state)
    assert traffic.all_reduces == 0
    assert all(torch.equal(part, was) for part, was in zip(state, before, strict=True))


def test_a_batch_without_slots_needs_no_state_and_touches_none() -> None:
    mixer, state = make_mixer(), make_state()
    before = [part.clone() for part in state]
    batch = MambaMetadataBuilder("cpu").build(
        prefill_slots=[NULL_SLOT], prefill_lengths=[5], has_initial_states=[False]
    )
    h = torch.randn(5, 6)
    assert torch.equal(mixer(h, batch, state), mixer(h, batch))
    assert torch.equal(mixer(h, batch), mixer(h))
    assert all(torch.equal(part, was) for part, was in zip(state, before, strict=True))


def test_padding_rows_give_zeros_before_out_proj() -> None:
    mixer, state = make_mixer(), make_state()
    batch = MambaMetadataBuilder("cpu").build(num_padded_decodes=2)
    assert not mixer(torch.randn(2, 6), batch, state).any()
