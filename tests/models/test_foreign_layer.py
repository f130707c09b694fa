"""A layer with a state of its own, mixed with Mamba layers in one model and one cache, without a line of the package
changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from tp_mamba import MambaConfig, MambaForCausalLM, SamplingParams, TensorParallel
from tp_mamba.batch import NULL_SLOT, MambaMetadata, MambaMetadataBuilder
from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.layers.linear import ColumnParallelLinear, RowParallelLinear
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.layers.state_spec import StateSpec
from tp_mamba.models import MAMBA
from tp_mamba.models.block import MambaBlock
from tp_mamba.models.mamba.config import parse
from tp_mamba.models.registry import families, register_family, unregister_family
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard

IDS = torch.arange(23)[None] % 97


class AverageState(NamedTuple):
    average: torch.Tensor
    """``[slots, E/n]``: cut over the ranks as the channels are."""
    last: torch.Tensor
    """``[slots, H]``: whole on every rank."""


class Averager(ShardedModule):
    """``a_t = decay * a_(t-1) + (1 - decay) * W (h_t + h_(t-1)); y_t = V a_t``, over ``E`` channels."""

    state_type = AverageState

    def __init__(
        self, H: int, E: int, tp: TensorParallel, dtype: torch.dtype, device: torch.device, prefix: str
    ):
        super().__init__(tp, prefix)
        self.H, self.E = H, E
        options = {"bias": False, "tp": tp, "dtype": dtype, "device": device}
        self.in_proj = ColumnParallelLinear(H, E, prefix=f"{prefix}.in_proj", **options)
        self.out_proj = RowParallelLinear(E, H, prefix=f"{prefix}.out_proj", **options)
        self.decay = self.add_parameter(
            "decay", Shard(shape=(E,), dim=0, wide=True), dtype=dtype, device=device
        )
        if not self.decay.is_meta:
            self.load_full("decay", torch.linspace(0.5, 0.95, E))

    def state_spec(self) -> list[StateSpec]:
        return [
            StateSpec(name="average", shape=(self.E,), dtype=torch.float32, dim=0),
            StateSpec(name="last", shape=(self.H,), dtype=torch.float32),
        ]

    def forward(
        self, h_TH: torch.Tensor, metadata: MambaMetadata, state: AverageState | None
    ) -> torch.Tensor:
        starts, slots = metadata.query_start_loc.tolist(), metadata.state_indices.tolist()
        averages = []
        for row, (slot, continues) in enumerate(
            zip(slots, metadata.has_initial_states.tolist(), strict=True)
        ):
            h = h_TH[starts[row] : starts[row + 1]]
            keeps = state is not None and slot != NULL_SLOT
            before = state.last[slot] if keeps and continues else torch.zeros(self.H)
            average = state.average[slot].clone() if keeps and continues else torch.zeros(len(self.decay))
            x = self.in_proj(h + torch.cat([before[None], h[:-1]]))
            for x_t in x:
                average = self.decay * average + (1 - self.decay) * x_t
                averages.append(average)
            if keeps and len(h):
                state.average[slot], state.last[slot] = average, h[-1]
        return self.out_proj(torch.stack(averages))


class AveragerBlock(nn.Module):
    def __init__(
        self, config: MambaConfig, tp: TensorParallel, dtype: torch.dtype, device: torch.device, prefix: str
    ):
        super().__init__()
        H = config.hidden_size
        self.norm = RMSNorm(H, tp=tp, dtype=dtype, device=device, prefix=f"{prefix}.norm")
        self.mixer = Averager(H, config.extra["averaged_channels"], tp, dtype, device, f"{prefix}.mixer")

    def forward(self, h, residual, metadata, state):
        h, residual = self.norm.add(h, residual)
        return self.mixer(h, metadata, state), residual

    def scale_residual_branch(self, layers: int) -> None:
        """Its initial values are small enough."""


def build_block(config, index, *, tp, dtype, device, prefix):
    if index % 2:
        return AveragerBlock(config, tp, dtype, device, prefix)
    return MambaBlock(config, index, tp=tp, dtype=dtype, device=device, prefix=prefix)


MIXED = dataclasses.replace(MAMBA, model_type="mixed", recognises=None, parse=parse, build_block=build_block)
CONFIG = {
    "model_type": "mixed",
    "hidden_size": 20,
    "intermediate_size": 31,
    "num_hidden_layers": 4,
    "vocab_size": 97,
    "averaged_channels": 13,
    "eos_token_id": None,
    "dtype": "float32",
}


@contextmanager
def registered() -> Iterator[None]:
    if MIXED in families():  # one rank runs in the process of the test
        yield
        return
    register_family(MIXED)
    try:
        yield
    finally:
        unregister_family("mixed")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """Random weights, written by the model itself."""
    with registered():
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig.from_dict(CONFIG))
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.3)
        model.save_pretrained(tmp_path / "mixed")
        yield tmp_path / "mixed"


def run(tp: TensorParallel, folder: Path, state_in: Path | None, state_out: Path | None) -> dict[str, object]:
    """One rank: logits at once, in chunks and steps beside another sequence, and from a saved state; greedy text."""
    with registered():
        model = MambaForCausalLM.from_pretrained(folder, tp)
        cache, builder = model.new_cache(3), MambaMetadataBuilder("cpu")
        slot, other = cache.allocate(), cache.allocate()
        ids, logits, taken = IDS[0], [], 0
        for length in (7, 1, 9):
            # The other sequence takes its first tokens in the same pass, and then decodes beside this one.
            decodes = [other] if taken else []
            prefills = [slot] if taken else [slot, other]
            metadata = builder.build(
                decode_slots=decodes,
                prefill_slots=prefills,
                prefill_lengths=[length, 5][: len(prefills)],
                has_initial_states=[taken > 0, False][: len(prefills)],
            )
            beside = torch.full((1 if taken else 5,), 3)
            own = ids[taken : taken + length]
            out = model.forward_packed(torch.cat([beside, own] if taken else [own, beside]), metadata, cache)
            logits.append(out[1:] if taken else out[:length])
            taken += length
        if state_out is not None:
            cache.save(state_out, slot)
        if state_in is not None:
            cache.copy(other, slot)
            cache.load(state_in, slot)
        for token in ids[taken:]:
            metadata = builder.build(decode_slots=[slot])
            logits.append(model.forward_packed(token[None], metadata, cache))
        prompts = [[1, 2, 3], [5], [7, 8, 9, 10, 11]]
        results = model.generate(
            prompts, SamplingParams(max_new_tokens=6), max_batch_size=2, max_prefill_tokens=4
        )
        return {
            "whole": model(IDS)[0],
            "pieces": torch.cat(logits),
            "text": [result.token_ids for result in results],
            "shapes": [tuple(tensor.shape) for tensor in cache.layer(1)],
            "bytes": model.bytes_per_slot,
        }


def test_mixed_states_at_every_rank_count(ranks, checkpoint: Path, tmp_path: Path) -> None:
    results, state = {}, None
    for n in (1, 2, 3):
        # Each rank count goes on from the state that the one before has saved.
        saved = tmp_path / f"state-{n}"
        results[n] = ranks(n).run(run, checkpoint, state, saved)
        state = saved
    expected = results[1][0]["whole"]
    for n, of_ranks in results.items():
        for result in of_ranks:
            assert (result["whole"] - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert (result["pieces"] - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert result["text"] == results[1][0]["text"]
            assert result["shapes"] == [(3, -(-13 // n)), (3, 20)]  # one cut over the ranks, one whole
            mamba = 2 * -(-31 // n) * (16 + 3) * 4
            assert result["bytes"] == mamba + 2 * (-(-13 // n) + 20) * 4


def test_it_shards_and_merges(checkpoint: Path, tmp_path: Path) -> None:
    shard_checkpoint(checkpoint, tmp_path / "shards", 3)
    merge_checkpoint(tmp_path / "shards", tmp_path / "merged")
    expected = MambaForCausalLM.from_pretrained(checkpoint)(IDS)
    for folder in (tmp_path / "shards", tmp_path / "merged"):
        assert torch.equal(MambaForCausalLM.from_pretrained(folder)(IDS), expected)
