"""A prompt taken whole, step by step, cut anywhere, and among others: the same logits, and no other slot touched."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from model_factory import full_forward, save_case

from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.model import MambaForCausalLM
from tp_mamba.state.cache import MambaCache

LENGTH = 40
# Both sides are float32 sums of a few hundred terms in different orders; the issue is a wrong state, which shows in
# the first digits.
BOUND = 1e-5

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Loaded:
    """A model on a device, a prompt, and the prompt's logits from one whole forward."""

    def __init__(self, folder: Path, name: str, device: str) -> None:
        oracle = save_case(name, folder)
        self.ids = torch.randint(97, (LENGTH,), generator=torch.Generator().manual_seed(3))
        self.model = MambaForCausalLM.from_pretrained(folder, dtype=torch.float32, device=device)
        self.builder = MambaMetadataBuilder(device)
        self.whole = self.model(self.ids[None])[0]
        expected = full_forward(oracle, self.ids[None])[0]
        assert (self.whole.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()

    def prefill(self, cache: MambaCache, slot: int, start: int, stop: int) -> torch.Tensor:
        metadata = self.builder.build(
            prefill_slots=[slot], prefill_lengths=[stop - start], has_initial_states=[start > 0]
        )
        return self.model.forward_packed(self.ids[start:stop].to(self.model.device), metadata, cache)

    def step(self, cache: MambaCache, slot: int, position: int) -> torch.Tensor:
        metadata = self.builder.build(decode_slots=[slot])
        ids = self.ids[position : position + 1].to(self.model.device)
        return self.model.forward_packed(ids, metadata, cache)

    def check(self, logits: torch.Tensor, start: int, stop: int) -> None:
        expected = self.whole[start:stop]
        assert (logits - expected).abs().max() <= BOUND * self.whole.abs().max()


@pytest.fixture(scope="module", params=["mamba", "falcon-mamba", "mamba-biased-untied"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=DEVICES)
def loaded(request: pytest.FixtureRequest, name: str, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(tmp_path_factory.mktemp(name), name, request.param)


def test_step_by_step(loaded: Loaded) -> None:
    cache = loaded.model.new_cache(1)
    slot = cache.allocate()
    for position in range(LENGTH):
        loaded.check(loaded.step(cache, slot, position), position, position + 1)


def test_cut_at_every_position(loaded: Loaded) -> None:
    cache = loaded.model.new_cache(1)
    slot = cache.allocate()
    for cut in range(1, LENGTH):
        loaded.check(loaded.prefill(cache, slot, 0, cut), 0, cut)
        loaded.check(loaded.prefill(cache, slot, cut, LENGTH), cut, LENGTH)


def test_cut_into_many_pieces_then_steps(loaded: Loaded) -> None:
    cache = loaded.model.new_cache(1)
    slot = cache.allocate()
    edges = [0, 1, 2, 4, 5, 12, 30]
    for start, stop in pairwise(edges):
        loaded.check(loaded.prefill(cache, slot, start, stop), start, stop)
    for position in range(30, LENGTH):
        loaded.check(loaded.step(cache, slot, position), position, position + 1)


def test_mixed_with_others_in_one_packed_batch(loaded: Loaded) -> None:
    """A decode row, padding rows, a fresh prompt and a continued one together: each as if it were alone."""
    cache = loaded.model.new_cache(6)
    decoding, fresh, continued, bystander = (cache.allocate() for _ in range(4))
    loaded.prefill(cache, decoding, 0, 17)
    loaded.prefill(cache, continued, 0, 9)
    loaded.prefill(cache, bystander, 0, 21)
    for state in (cache.conv_states, cache.ssm_states):
        state[:, 4:] = float("nan")  # slots that nobody has taken
    untouched = [bystander, 4, 5]
    before = [state[:, untouched].clone() for state in (cache.conv_states, cache.ssm_states)]

    metadata = loaded.builder.build(
        decode_slots=[decoding],
        num_padded_decodes=3,
        prefill_slots=[fresh, continued],
        prefill_lengths=[11, 30],
        has_initial_states=[False, True],
    )
    ids = torch.cat([loaded.ids[17:18], torch.zeros(2, dtype=torch.int64), loaded.ids[:11], loaded.ids[9:39]])
    logits = loaded.model.forward_packed(ids.to(loaded.model.device), metadata, cache)
    assert logits.isfinite().all()
    loaded.check(logits[:1], 17, 18)
    loaded.check(logits[3:14], 0, 11)
    loaded.check(logits[14:], 9, 39)

    after = [state[:, untouched] for state in (cache.conv_states, cache.ssm_states)]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
    loaded.check(loaded.step(cache, bystander, 21), 21, 22)
    loaded.check(loaded.step(cache, continued, 39), 39, 40)


def test_only_the_logits_that_are_asked_for(loaded: Loaded) -> None:
    cache = loaded.model.new_cache(1)
    metadata = loaded.builder.build(
        prefill_slots=[cache.allocate()], prefill_lengths=[LENGTH], has_initial_states=[False]
    )
    wanted = torch.tensor([39, 4], device=loaded.model.device)
    logits = loaded.model.forward_packed(loaded.ids.to(loaded.model.device), metadata, cache, wanted)
    assert logits.shape == (2, 97)
    loaded.check(logits[:1], 39, 40)
    loaded.check(logits[1:], 4, 5)
