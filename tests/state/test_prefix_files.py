"""Kept prefixes written to the disk and read back: whole, of the same model, at any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tp_mamba.model import MambaForCausalLM
from tp_mamba.models.config import MambaConfig
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.state.cache import MambaCache
from tp_mamba.state.prefix import PrefixCache
from tp_mamba.state.prefix_files import load_prefixes, save_prefixes

CONFIG = MambaConfig(
    model_type="mamba", hidden_size=6, intermediate_size=14, num_hidden_layers=2, state_size=4,
    conv_kernel=3, time_step_rank=2, vocab_size=20,
)  # fmt: skip
PROMPTS = [(1, 2, 3), (1, 2, 5, 6), (7,)]


def _cache(tp: TensorParallel | None = None, slots: int = 4, config: MambaConfig = CONFIG) -> MambaCache:
    return MambaForCausalLM(config, tp, device="cpu").new_cache(slots)


def _kept(cache: MambaCache, prompts: list[tuple[int, ...]] = PROMPTS) -> PrefixCache:
    """A snapshot of each prompt whose state is filled with its number, channels beyond D left at zero."""
    prefixes = PrefixCache(cache, 3)
    for number, prompt in enumerate(prompts, start=1):
        slot = cache.allocate()
        local = slice(0, max(0, 14 - cache.tp.rank * cache.ssm_states.shape[2]))
        cache.ssm_states[:, slot, local] = number
        cache.conv_states[:, slot, local] = -number
        prefixes.give(prompt, slot)
    return prefixes


def _save(tp: TensorParallel, folder: Path) -> int:
    cache = _cache(tp)
    return save_prefixes(_kept(cache), cache, folder)


def _load(tp: TensorParallel, folder: Path) -> list[tuple[tuple[int, ...], float, float]]:
    cache = _cache(tp)
    prefixes = PrefixCache(cache, 3)
    assert load_prefixes(prefixes, cache, folder) == len(prefixes) == 3
    ssm, conv = cache.ssm_states[0, :, 0, 0], cache.conv_states[1, :, 0, 0]
    return [
        (tuple(tokens.tolist()), float(ssm[each.slot]), float(conv[each.slot]))
        for tokens, each in prefixes.snapshots()
    ]


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 3), (3, 1), (1, 2)])
def test_they_move_between_rank_counts(ranks, tmp_path: Path, saved_at: int, loaded_at: int) -> None:
    assert ranks(saved_at).run(_save, tmp_path) == [3] * saved_at
    expected = [(prompt, float(number), -float(number)) for number, prompt in enumerate(PROMPTS, start=1)]
    assert ranks(loaded_at).run(_load, tmp_path) == [expected] * loaded_at


def test_the_files_of_prompts_that_are_kept_no_longer_are_removed(tmp_path: Path) -> None:
    cache = _cache()
    save_prefixes(_kept(cache), cache, tmp_path)
    (tmp_path / "notes.txt").write_text("not ours")
    before = {path.name for path in tmp_path.iterdir()}
    smaller = _cache()
    save_prefixes(_kept(smaller, PROMPTS[:1]), smaller, tmp_path)
    after = {path.name for path in tmp_path.iterdir()}
    assert len(before) == 5
    assert len(after) == 3
    assert after < before
    assert "notes.txt" in after


def test_those_used_last_are_taken_where_not_all_fit(tmp_path: Path) -> None:
    cache = _cache()
    save_prefixes(_kept(cache), cache, tmp_path)
    small = _cache(slots=1)
    prefixes = PrefixCache(small, 2)
    assert load_prefixes(prefixes, small, tmp_path) == 2
    assert [tuple(tokens.tolist()) for tokens, _ in prefixes.snapshots()] == PROMPTS[2:]
    assert float(small.ssm_states[0, 0, 0, 0]) == 3


def test_those_of_another_model_are_refused_and_no_slot_is_lost(tmp_path: Path) -> None:
    cache = _cache()
    save_prefixes(_kept(cache), cache, tmp_path)
    other = _cache(config=replace(CONFIG, layer_norm_epsilon=1e-3))
    with pytest.raises(ValueError, match="is the state of another model"):
        load_prefixes(PrefixCache(other, 3), other, tmp_path)
    assert other.num_free == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: "{",
        lambda index: json.dumps({**index, "format": "another"}),
        lambda index: json.dumps({**index, "snapshots": [{"count": 4, "tokens": [1, 2, 3]}]}),
        lambda index: json.dumps({"format": index["format"]}),
    ],
    ids=["cut off", "format", "count", "nothing in it"],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage) -> None:
    cache = _cache()
    save_prefixes(_kept(cache), cache, tmp_path)
    path = tmp_path / "prefixes.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"prefixes\.json is no readable index of kept prefixes"):
        load_prefixes(PrefixCache(cache, 3), cache, tmp_path)


def test_a_state_that_its_tokens_do_not_name_is_not_found(tmp_path: Path) -> None:
    """A file's name is the digest of its tokens: an index that was edited leads to no state, not to a wrong one."""
    cache = _cache()
    save_prefixes(_kept(cache), cache, tmp_path)
    path = tmp_path / "prefixes.json"
    index = json.loads(path.read_text())
    index["snapshots"][0]["tokens"][0] = 9
    path.write_text(json.dumps(index))
    fresh = _cache()
    with pytest.raises(ValueError, match="missing or damaged"):
        load_prefixes(PrefixCache(fresh, 3), fresh, tmp_path)
    assert torch.count_nonzero(fresh.ssm_states) == 0
