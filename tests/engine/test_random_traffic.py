"""Requests that join and leave at random: the text of each alone, no slot lost, kept states to the bit.

Few on a CPU; hundreds on a GPU, where steps are graphs and the host is a step behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_traffic import bits_of_hits, differing, held_after, keeping
from rank_pool import RankPool

from tp_mamba.parallel.group import TensorParallel
from tp_mamba.state.cache import MambaCache

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefixes kept": {"cache_config": keeping()},
    "logits cut": {"gather_logits": False},
}
KINDS = pytest.mark.parametrize("kind", OPTIONS)


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()


def one_gpu() -> TensorParallel:
    return TensorParallel(device=torch.device("cuda", torch.cuda.current_device()))


def check_happened(happened: dict[str, int], kind: str, count: int) -> None:
    """Keeps the tests able to fail: there was something to tell apart."""
    assert happened["most at a time"] > 2
    assert happened["tokens"] > 2 * count
    assert (happened["reused"] > count) == (kind == "prefixes kept")


@pytest.mark.parametrize(("kind", "size"), [("plain", 1), ("prefixes kept", 1), ("prefixes kept", 2)])
def test_requests_say_beside_others_what_they_say_alone(ranks, kind: str, size: int) -> None:
    for wrong, happened in ranks(size).run(differing, 20, 3, OPTIONS[kind] | {"overlap": True}):
        assert wrong == []
        check_happened(happened, kind, 20)


@pytest.mark.gpu
@KINDS
def test_200_requests_on_a_gpu_say_what_they_say_alone(kind: str) -> None:
    wrong, happened = differing(one_gpu(), 200, 4, OPTIONS[kind])
    assert wrong == []
    check_happened(happened, kind, 200)
    assert happened["graphs"] > 8
    assert happened["aborted"] > 5


@pytest.mark.gpu
@pytest.mark.multigpu
@KINDS
def test_200_requests_on_two_gpus_say_what_they_say_alone(gpus: RankPool, kind: str) -> None:
    for wrong, happened in gpus.run(differing, 200, 4, OPTIONS[kind]):
        assert wrong == []
        check_happened(happened, kind, 200)
        assert happened["graphs"] > 8


def test_random_steps_of_the_real_model_lose_no_slot() -> None:
    held_after(TensorParallel(device="cpu"), 25, {"cache_config": keeping(), "overlap": True})


@pytest.mark.gpu
@KINDS
def test_5000_random_steps_lose_no_slot_and_no_memory(kind: str) -> None:
    held = held_after(one_gpu(), 1700, OPTIONS[kind])
    if kind != "prefixes kept":  # what is kept of other texts makes other steps
        assert held[2] == held[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_state_gives_the_bits_of_a_miss(device: str, dtype: torch.dtype) -> None:
    tp, count = (TensorParallel(device="cpu"), 5) if device == "cpu" else (one_gpu(), 20)
    assert bits_of_hits(tp, dtype, count) == ([], count)


def test_a_kept_state_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MambaCache.copy

    def wrong(self: MambaCache, source: int, target: int) -> None:
        right(self, source, target)
        self.ssm_states[:, target] *= 1 + 1e-6

    monkeypatch.setattr(MambaCache, "copy", wrong)
    found, hits = bits_of_hits(TensorParallel(device="cpu"), torch.float32, 3)
    assert len(found) == hits == 3
