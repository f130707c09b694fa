"""Kept prefixes: the tree against a plain dictionary, what is kept and dropped, and no slot lost."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tp_mamba.state.prefix import WORTHWHILE, PrefixCache


class TokenCache:
    """A cache whose states are the tokens that they stand for, so that a wrong one shows."""

    def __init__(self, slots: int) -> None:
        self.free_slots = list(range(slots))
        self.states: dict[int, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        return len(self.free_slots)

    def allocate(self) -> int:
        slot = self.free_slots.pop(0)
        self.states[slot] = ()
        return slot

    def free(self, slot: int) -> None:
        del self.states[slot]
        self.free_slots.append(slot)

    def copy(self, source: int, target: int) -> None:
        self.states[target] = self.states[source]

    def run(self, tokens: tuple[int, ...]) -> int:
        slot = self.allocate()
        self.states[slot] = tokens
        return slot


def _put(prefixes: PrefixCache, cache: TokenCache, tokens: tuple[int, ...], give: bool = False) -> None:
    slot = cache.run(tokens)
    if give:
        prefixes.give(tokens, slot)
    else:
        prefixes.put(tokens, slot)
        cache.free(slot)


@pytest.mark.parametrize("capacity", [1, 3, 40])
def test_ten_thousand_random_prompts_hit_what_a_dictionary_would(capacity: int) -> None:
    draw = random.Random(capacity)
    cache = TokenCache(capacity + 1)
    prefixes = PrefixCache(cache, capacity)
    kept: dict[tuple[int, ...], None] = {}  # in the order of use
    for _ in range(10_000):
        tokens = tuple(draw.choices((0, 1, 2), weights=(8, 1, 1), k=draw.randint(1, 9)))
        if draw.random() < 0.5:
            fitting = [known for known in kept if len(known) < len(tokens) and tokens[: len(known)] == known]
            best = max(fitting, key=len, default=None)
            hit = draw.choice((prefixes.use, prefixes.longest))(tokens)
            assert (best is None) == (hit is None)
            if best is not None:
                assert (hit.count, cache.states[hit.slot]) == (len(best), best)
                assert prefixes.use(tokens) == hit
                kept[best] = kept.pop(best)
        else:
            known = tokens in kept
            kept.pop(tokens, None)
            if len(kept) == capacity:
                del kept[next(iter(kept))]
            if not known:  # it goes on from these
                for count in range(1, len(tokens)):
                    if tokens[:count] in kept:
                        kept[tokens[:count]] = kept.pop(tokens[:count])
            kept[tokens] = None
            _put(prefixes, cache, tokens, give=draw.random() < 0.5)
        assert cache.num_free == capacity + 1 - len(kept), "a slot was lost, or freed twice"
    found = [(tuple(tokens.tolist()), cache.states[each.slot]) for tokens, each in prefixes.snapshots()]
    assert found == [(tokens, tokens) for tokens in kept]
    prefixes.clear()
    assert cache.num_free == capacity + 1
    assert not prefixes._root.children, "a path to no snapshot was left in the tree"


def test_a_beginning_outlives_what_goes_on_from_it() -> None:
    cache = TokenCache(6)
    prefixes = PrefixCache(cache, 5)
    _put(prefixes, cache, (0,) * 40)
    for last in range(1, 50):  # more ends than there is room for, none of which finds anything new
        _put(prefixes, cache, (0,) * 40 + (last,) * 40, give=bool(last % 2))
        assert prefixes.longest((0,) * 40 + (99,)) is not None


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    cache = TokenCache(3)
    prefixes = PrefixCache(cache, 2)
    _put(prefixes, cache, (1, 2, 3))
    assert prefixes.longest((1, 2, 3)) is None
    assert prefixes.use((1, 2, 3, 4)).count == 3
    assert (prefixes.hits, prefixes.hit_tokens) == (1, 3)


def _prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, length).tolist()


def test_snapshots_at_the_end_at_the_junction_and_at_every_block() -> None:
    cache = TokenCache(9)
    prefixes = PrefixCache(cache, 8, block_size=100)
    shared = _prompt(0, 250)
    first, second = shared + _prompt(1, 150), shared + _prompt(2, 140)
    assert prefixes.cuts(first) == [100, 200, 300, 400]
    for count in prefixes.cuts(first):
        _put(prefixes, cache, tuple(first[:count]))
    start = prefixes.longest(second).count
    assert start == 200
    assert prefixes.cuts(second, start) == [250, 300, 390]
    for count in prefixes.cuts(second, start):
        _put(prefixes, cache, tuple(second[:count]))
    assert prefixes.longest(shared + _prompt(3, 10)).count == 250, "a third prompt begins at the junction"


def test_near_neighbours_are_not_both_kept() -> None:
    prefixes = PrefixCache(TokenCache(1), 1, block_size=100)
    assert prefixes.cuts(_prompt(0, 100 + WORTHWHILE - 1)) == [100 + WORTHWHILE - 1]
    assert prefixes.cuts(_prompt(0, 100 + WORTHWHILE)) == [100, 100 + WORTHWHILE]
    assert prefixes.cuts(_prompt(0, WORTHWHILE - 1)) == []
    assert prefixes.cuts(_prompt(0, 300), start=280) == []


def test_a_prompt_asked_again_is_kept_before_its_last_token() -> None:
    cache = TokenCache(4)
    prefixes = PrefixCache(cache, 3)
    prompt = _prompt(0, 80)
    _put(prefixes, cache, tuple(prompt))
    assert prefixes.longest(prompt) is None
    assert prefixes.cuts(prompt) == [79, 80]
    _put(prefixes, cache, tuple(prompt[:79]))
    assert prefixes.longest(prompt).count == 79


def test_where_no_slot_is_free_nothing_is_kept() -> None:
    cache = TokenCache(1)
    prefixes = PrefixCache(cache, 2)
    slot = cache.run((1, 2))
    prefixes.put((1, 2), slot)
    assert len(prefixes) == 0
    prefixes.give((1, 2), slot)
    assert len(prefixes) == 1, "a slot that is given needs no other"


@pytest.mark.parametrize(("capacity", "block_size", "name"), [(0, None, "capacity"), (1, 0, "block_size")])
def test_no_room_is_refused(capacity: int, block_size: int | None, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 keeps no snapshot"):
        PrefixCache(TokenCache(1), capacity, block_size)
