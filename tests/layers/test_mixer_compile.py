"""The mixer under torch.compile in one graph: with and without metadata, prefill and decode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.kernels import linear
from tp_mamba.mixer import MambaMixer, MambaState


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_mixer() -> MambaMixer:
    torch.manual_seed(0)
    return MambaMixer(6, 4, 3, 10, 2, True, False, True)


@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6)])
@torch.no_grad()
def test_without_metadata(shape: tuple[int, ...]) -> None:
    mixer, h = make_mixer(), torch.randn(shape)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), mixer(h), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_with_metadata_and_state() -> None:
    mixer, build = make_mixer(), MambaMetadataBuilder("cpu").build
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    states = [MambaState(torch.zeros(3, 2, 10).mT, torch.zeros(3, 4, 10).mT) for _ in range(2)]
    prefill = build(prefill_slots=[0, 2], prefill_lengths=[4, 1], has_initial_states=[False, False])
    for batch, tokens in (
        (prefill, 5),
        (build(decode_slots=[2, 0]), 2),
        (build(decode_slots=[0], prefill_slots=[1], prefill_lengths=[3], has_initial_states=[False]), 4),
    ):
        h = torch.randn(tokens, 6)
        expected, found = mixer(h, batch, states[0]), compiled(h, batch, states[1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(*states, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_the_number_of_multiprocessors_is_a_constant_for_a_compiler() -> None:
    assert vars(linear._sm_count) == vars(torch.compiler.assume_constant_result(lambda: None)) != {}
