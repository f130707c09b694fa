"""Slot numbers and who holds them."""

import pytest
import torch

from tp_mamba.mixer import MambaMixer
from tp_mamba.state.cache import MambaCache
from tp_mamba.state.slots import SlotPool


def test_a_shared_slot_is_free_when_its_last_holder_lets_go() -> None:
    pool = SlotPool(2)
    assert [pool.acquire(), pool.acquire()] == [0, 1]
    pool.share(1)
    pool.release(1)
    assert (pool.holders(1), pool.num_free) == (1, 0)
    pool.release(1)
    assert (pool.holders(1), pool.num_free) == (0, 1)
    for call in (pool.share, pool.release, pool.check_used):
        with pytest.raises(ValueError, match=r"slot 1 is not in use \(slots in use: \[0\]\)"):
            call(1)
    assert pool.acquire() == 1


def test_a_holder_of_a_shared_slot_owns_a_copy_and_the_last_one_the_slot() -> None:
    cache = MambaCache([MambaMixer(6, 4, 3, 14, 2, True, False, False, device="cpu")], 3)
    prefix = cache.allocate()
    cache.ssm_states[:, prefix] = 7
    cache.share(prefix)
    mine = cache.own(prefix)
    assert (mine, cache.num_free) == (1, 1)
    assert torch.equal(cache.ssm_states[:, mine], cache.ssm_states[:, prefix])
    cache.ssm_states[:, mine] = 8
    assert (cache.ssm_states[:, prefix] == 7).all()
    assert cache.own(prefix) == prefix, "nobody shares it any more"
    cache.share(prefix)
    cache.allocate()
    with pytest.raises(ValueError, match="no free slot: all 3 are in use"):
        cache.own(prefix)
    cache.free(prefix)
    assert cache.own(prefix) == prefix, "what failed has changed nothing"
    cache.free(prefix)
    with pytest.raises(ValueError, match="slot 0 is not in use"):
        cache.own(prefix)
