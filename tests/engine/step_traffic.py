"""Schedules of random steps, run by two runners side by side."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from tp_mamba.config import MambaConfig
from tp_mamba.engine.ladder import Ladder
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.engine.runner import Runner
from tp_mamba.engine.scheduler import Schedule, Scheduler
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel

SLOTS, BUDGET = 9, 70


def small_model(dtype: torch.dtype, tp: TensorParallel | None = None) -> MambaForCausalLM:
    """Two layers whose states matter, with a mixer's layout; the same at every number of ranks."""
    config = MambaConfig(
        model_type="falcon_mamba",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        state_size=16,
        conv_kernel=4,
        time_step_rank=16,
        vocab_size=97,
        tie_word_embeddings=False,
        mixer_norm="weightless",
    )
    torch.manual_seed(4)
    model = MambaForCausalLM(config, tp, dtype=dtype)
    for layer in model.backbone.layers:
        layer.mixer.out_proj.divide_weight_(0.1)  # else all that is heard is the embedding
    model.backbone.embeddings.weight.data.mul_(50)
    return model


def schedules(cache: Any, steps: int, seed: int) -> Iterator[Schedule]:
    """``steps`` passes over requests that come, end and are dropped at random; ``cache`` gives the slots."""
    rng, scheduler, alive, made = random.Random(seed), Scheduler(BUDGET), list[Request](), 0
    for _ in range(steps):
        while rng.random() < 0.4 or not alive:
            length = rng.choice([1, 1, 2, 3, 7, 16, 40, 150])
            params = SamplingParams(max_new_tokens=rng.choice([1, 4, 30]))
            alive.append(Request(made, [rng.randrange(97) for _ in range(length)], params))
            scheduler.add(alive[-1])
            made += 1
        schedule = scheduler.schedule(cache)
        yield schedule
        for request in schedule.sampling:
            request.launched += 1
        for request in list(alive):
            if request.all_launched or rng.random() < 0.02:
                scheduler.remove(request)
                alive.remove(request)
                if request.slot is not None:
                    cache.free(request.slot)


class Twins:
    """Two caches whose slots are taken and given back together."""

    def __init__(self, model: MambaForCausalLM) -> None:
        self.caches = model.new_cache(SLOTS), model.new_cache(SLOTS)

    @property
    def num_free(self) -> int:
        return self.caches[0].num_free

    def allocate(self) -> int:
        slot, other = (cache.allocate() for cache in self.caches)
        assert slot == other
        return slot

    def free(self, slot: int) -> None:
        for cache in self.caches:
            cache.free(slot)

    def differ(self) -> bool:
        """Whether any state of theirs does, those of free slots included."""
        one, other = self.caches
        return not (
            torch.equal(one.conv_states, other.conv_states) and torch.equal(one.ssm_states, other.ssm_states)
        )


def padded(model: MambaForCausalLM, cache: Any, capture: Any) -> Runner:
    return Runner(model, cache, SLOTS, BUDGET, ladder=Ladder(SLOTS, BUDGET), capture=capture)


@torch.inference_mode()
def side_by_side(
    model: MambaForCausalLM, make: tuple[Any, Any], steps: int, seed: int
) -> Iterator[tuple[Schedule, torch.Tensor, torch.Tensor, Twins]]:
    """Each step of a random trace by two runners, made by ``make(model, cache)``: its logits by either, and the caches
    after it. Both go on from the tokens that the first finds likeliest."""
    twins = Twins(model)
    one, other = (each(model, cache) for each, cache in zip(make, twins.caches, strict=True))
    for schedule in schedules(twins, steps, seed):
        taken = [chunk.request.taken for chunk in schedule.chunks]
        logits = one.forward(schedule)
        for chunk, before in zip(schedule.chunks, taken, strict=True):
            chunk.request.taken = before
        expected = other.forward(schedule)
        yield schedule, logits, expected, twins
        tokens = logits.argmax(-1)
        one.give(tokens)
        other.give(tokens)
