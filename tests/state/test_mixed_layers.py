"""Layers of another kind beside Mamba's, in one model and one cache: nothing in the package knows them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tp_mamba.engine.generate import generate
from tp_mamba.layers.state_spec import StateSpec
from tp_mamba.mixer import MambaMixer, MambaState
from tp_mamba.model import MambaForCausalLM
from tp_mamba.models.config import MambaConfig
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.state.cache import MambaCache

HIDDEN = 12


class Average(NamedTuple):
    total: torch.Tensor
    count: torch.Tensor


class RunningAverage(nn.Module):
    """Adds the mean of all tokens before to each token: a state cut into heads, and a counter that is not."""

    state_type = Average

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.heads = StateSpec(name="total", shape=(2, HIDDEN), dtype=torch.float64, dim=1, granularity=4)

    def state_spec(self) -> list[StateSpec]:
        return [self.heads, StateSpec(name="count", shape=(1,), dtype=torch.int64)]

    def forward(self, h_TH: torch.Tensor, metadata, state: Average) -> torch.Tensor:
        starts, out = metadata.query_start_loc.tolist(), torch.empty_like(h_TH)
        shard = self.heads.stacked(1)
        for row, slot in enumerate(metadata.state_indices.tolist()):
            if not metadata.has_initial_states[row]:
                state.total[slot], state.count[slot] = 0, 0
            for t in range(starts[row], starts[row + 1]):
                both = torch.stack([h_TH[t].double(), h_TH[t].double() ** 2])
                state.total[slot] += shard.shard(both[None], self.tp.rank, self.tp.size)[0]
                state.count[slot] += 1
                pieces = self.tp.all_gather(state.total[slot][None], dim=2).chunk(self.tp.size, dim=2)
                mean = shard.merge(pieces)[0, 0] / state.count[slot]
                out[t] = h_TH[t] + mean.to(h_TH.dtype)
        return out


def mixed_model(tp: TensorParallel) -> MambaForCausalLM:
    """Mamba, average, Mamba with a wider convolution, average."""
    torch.manual_seed(3)
    config = MambaConfig(
        model_type="mamba", hidden_size=HIDDEN, intermediate_size=21, num_hidden_layers=4, state_size=4,
        conv_kernel=3, time_step_rank=2, vocab_size=40,
    )  # fmt: skip
    model = MambaForCausalLM(config, tp=tp, dtype=torch.float32, device="cpu")
    blocks = model.backbone.layers
    blocks[2].mixer = MambaMixer(HIDDEN, 4, 4, 21, 2, True, False, False, tp=tp, device="cpu")
    for position in (1, 3):
        blocks[position].mixer = RunningAverage(tp)
    return model


def _generate_and_save(tp: TensorParallel, path: Path) -> tuple[list[list[int]], torch.Tensor]:
    model, prompts = mixed_model(tp), [[5, 6, 7, 8, 9], [3], [11, 12, 13]]
    results = generate(model, prompts, max_new_tokens=6, max_prefill_tokens=4, max_batch_size=2)
    cache = model.new_cache(2)
    slot = cache.allocate()
    for position, state in enumerate(map(cache.layer, range(4))):
        for number, tensor in enumerate(state):
            tensor[slot] = 10 * position + number
    cache.save(path, slot)
    return [result.token_ids for result in results], torch.tensor(cache.bytes_per_slot)


def _load(tp: TensorParallel, path: Path) -> list[list[tuple[str, float]]]:
    cache = mixed_model(tp).new_cache(3)
    cache.allocate()
    slot = cache.allocate()
    cache.load(path, slot)
    found = []
    for state in map(cache.layer, range(4)):
        assert all(not tensor[0].any() and not tensor[2].any() for tensor in state)
        found.append([(name, float(tensor[slot].max())) for name, tensor in state._asdict().items()])
    return found


def test_text_and_files_at_every_rank_count(ranks, tmp_path: Path) -> None:
    one = ranks(1).run(_generate_and_save, tmp_path / "1")[0][0]
    assert len({tuple(ids) for ids in one}) == 3
    expected = [
        [("conv_state", 0.0), ("ssm_state", 1.0)],
        [("total", 10.0), ("count", 11.0)],
        [("conv_state", 20.0), ("ssm_state", 21.0)],
        [("total", 30.0), ("count", 31.0)],
    ]
    for n in (2, 3):
        assert [ids for ids, _ in ranks(n).run(_generate_and_save, tmp_path / str(n))] == [one] * n
        for saved_at in ("1", str(n)):
            assert ranks(n).run(_load, tmp_path / saved_at) == [expected] * n
    assert ranks(1).run(_load, tmp_path / "3") == [expected]


def test_layers_that_are_alike_share_a_tensor_and_each_gets_its_own_type(tmp_path: Path) -> None:
    model = mixed_model(TensorParallel(device="cpu"))
    cache = model.new_cache(3)
    types = [type(cache.layer(i)) for i in range(4)]
    assert types == [MambaState, Average, MambaState, Average]
    assert cache.layer(1).total.shape == (3, 2, HIDDEN)
    assert (
        cache.layer(1).total.untyped_storage().data_ptr() == cache.layer(3).total.untyped_storage().data_ptr()
    )
    assert cache.layer(0).conv_state.stride(1) == cache.layer(2).conv_state.stride(1) == 1
    assert cache.bytes_per_slot == model.bytes_per_slot == 21 * 4 * (2 + 3 + 2 * 4) + 2 * (2 * HIDDEN * 8 + 8)
    with pytest.raises(ValueError, match=r"no one conv_state for all layers, the states are conv_state\.0, "):
        _ = cache.conv_states
    cache.save(tmp_path / "state", cache.allocate())
    with safe_open(tmp_path / "state", framework="pt") as file:
        names = sorted(file.keys())
    assert names == ["conv_state.0", "conv_state.2", "count", "ssm_state.0", "ssm_state.2", "total"]


def test_a_slot_of_any_mixture_is_zeroed_and_copied_whole() -> None:
    cache = mixed_model(TensorParallel(device="cpu")).new_cache(2)
    source, target = cache.allocate(), cache.allocate()
    tensors = [tensor for i in range(4) for tensor in cache.layer(i)]
    for number, tensor in enumerate(tensors, 1):
        tensor[source] = number
    cache.copy(source, target)
    assert [float(tensor[target].min()) for tensor in tensors] == list(range(1, 9))
    cache.free(target)
    assert cache.allocate() == target
    assert not any(tensor[target].any() for tensor in tensors)
    assert all(tensor[source].all() for tensor in tensors)


class Forgetful(nn.Module):
    """A layer without memory."""

    tp = TensorParallel(device="cpu")

    def state_spec(self) -> list[StateSpec]:
        return []


def test_layers_without_memory_take_no_room() -> None:
    mixer = MambaMixer(6, 4, 3, 14, 2, True, False, False, device="cpu")
    cache, alone = MambaCache([Forgetful(), mixer, Forgetful()], 2), MambaCache([mixer], 2)
    assert (cache.num_layers, cache.bytes_per_slot) == (3, alone.bytes_per_slot)
    assert cache.layer(0) == ()
    assert cache.conv_states.shape == alone.conv_states.shape


def test_what_declares_no_state_is_refused() -> None:
    with pytest.raises(
        ValueError, match="layer 0 is a Linear, which declares no state: give layers with state_"
    ):
        MambaCache([nn.Linear(2, 2)], 1)  # type: ignore[list-item]
    twice = Forgetful()
    twice.state_spec = lambda: [StateSpec(name="x", shape=(n,), dtype=torch.float32) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"layer 0 keeps states \['x', 'x'\]: give each a name of its own"):
        MambaCache([twice], 1)
    with pytest.raises(
        ValueError, match=r"the state x of shape \[3\] has no dimension 1: give dim one of its"
    ):
        StateSpec(name="x", shape=(3,), dtype=torch.float32, dim=1)
