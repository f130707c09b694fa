"""A second kind of weight, held as two factors, given from outside: through mixer, loader, saver, shard, merge, plan.

Not a line of the package knows of it. Its oracle is the dense model whose weights are the products of the factors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tp_mamba import MambaConfig, MambaForCausalLM, MambaMetadataBuilder
from tp_mamba.checkpoint.shards import merge_checkpoint, shard_checkpoint
from tp_mamba.launch.verbs.plan import rows_of
from tp_mamba.layers.linear import ColumnParallelLinear
from tp_mamba.layers.weights import (
    Dense,
    LinearWeight,
    register_weight_kind,
    unregister_weight_kind,
    weight_kinds,
)
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard, sharded_tensors

RANK = 5
SIZES = {"hidden_size": 8, "intermediate_size": 13, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 3}
SIZES |= {"time_step_rank": 3, "vocab_size": 19, "use_bias": True}
IDS = torch.arange(12).view(2, 6)


class Factors(LinearWeight):
    """``W = left [out, RANK] @ right [RANK, in]``; one of the two is cut, the other whole on every rank."""

    def declare(
        self,
        layer: ShardedModule,
        whole: Shard,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        out_size, in_size = whole.shape
        by_row = whole.dim == 0
        left = Shard(shape=(out_size, RANK), dim=0 if by_row else None, pieces=whole.pieces if by_row else ())
        right = Shard(shape=(RANK, in_size), dim=None if by_row else 1)
        layer.add_parameter("left", left, dtype=dtype, device=device)
        layer.add_parameter("right", right, dtype=dtype, device=device)

    def initialize(self, layer: ShardedModule, draw: Callable[[torch.Tensor], object]) -> None:
        for name in ("left", "right"):
            layer.load_full(name, torch.ones(layer.shards[name].shape))

    def divide_(self, layer: ShardedModule, divisor: float) -> None:
        layer.left.data.div_(divisor)

    def product(
        self, layer: ShardedModule, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.linear(F.linear(x, layer.right), layer.left, bias)


@pytest.fixture(scope="module", autouse=True)
def factors() -> Iterator[None]:
    register_weight_kind("factors", Factors())
    yield
    unregister_weight_kind("factors")
    assert "factors" not in weight_kinds()


def write(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of factors in ``folder/factors``, and the dense one that it stands for in ``folder/dense``."""
    generator = torch.Generator().manual_seed(0)
    config = MambaConfig(model_type="mamba", dtype=torch.float32, **SIZES)
    shapes = {t.name: t.shard.shape for t in sharded_tensors(MambaForCausalLM(config, device="meta"))}
    dense, factored = {}, {}
    for name, shape in shapes.items():
        full = torch.randn(shape, generator=generator) * 0.3
        if "proj.weight" in name:
            parts = (
                torch.randn(shape[0], RANK, generator=generator),
                torch.randn(RANK, shape[1], generator=generator),
            )
            for part, tensor in zip(("left", "right"), parts, strict=True):
                factored[name.replace("weight", part)] = tensor * 0.4
            dense[name] = factored[name.replace("weight", "left")] @ factored[name.replace("weight", "right")]
        else:
            dense[name] = factored[name] = full
    for name, tensors in (("dense", dense), ("factors", factored)):
        (folder / name).mkdir()
        fields = config.to_dict()
        if name == "factors":
            fields["quantization_config"] = {"quant_method": "factors"}
        (folder / name / "config.json").write_text(json.dumps(fields))
        save_file(tensors, folder / name / "model.safetensors")
    return factored


def _run(tp: TensorParallel, folder: Path, out: Path | None) -> dict[str, torch.Tensor]:
    register_weight_kind("factors", Factors())  # once in each process
    model = MambaForCausalLM.from_pretrained(folder, tp, device="cpu")
    build, cache = MambaMetadataBuilder("cpu").build, model.new_cache(2)
    slots = [cache.allocate() for _ in range(2)]
    prefill = build(prefill_slots=slots, prefill_lengths=[4, 2], has_initial_states=[False, False])
    found = {"whole": model(IDS), "prefill": model.forward_packed(IDS[0], prefill, cache)}
    found["decode"] = model.forward_packed(IDS[1, :2], build(decode_slots=slots), cache)
    mixed = build(
        decode_slots=slots[:1], prefill_slots=slots[1:], prefill_lengths=[3], has_initial_states=[True]
    )
    found["mixed"] = model.forward_packed(IDS[0, :4], mixed, cache)
    if out is not None:
        model.save_pretrained(out)
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_through_everything(ranks, n: int, tmp_path: Path) -> None:
    factored = write(tmp_path)
    expected = _run(TensorParallel(device="cpu"), tmp_path / "dense", None)
    shard_checkpoint(tmp_path / "factors", tmp_path / "sharded", n)
    merge_checkpoint(tmp_path / "sharded", tmp_path / "merged")
    for source, out in (("factors", tmp_path / "saved"), ("sharded", None), ("merged", None)):
        for found in ranks(n).run(_run, tmp_path / source, out):
            for name, logits in expected.items():
                torch.testing.assert_close(found[name], logits, rtol=2e-4, atol=2e-4)
    for folder in ("saved", "merged"):
        held = load_file(tmp_path / folder / "model.safetensors")
        assert sorted(held) == sorted(factored)
        assert all(torch.equal(held[name], factored[name]) for name in held)
        assert MambaConfig.from_pretrained(tmp_path / folder).weight_kind == "factors"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_plan_lists_the_factors(n: int) -> None:
    config = MambaConfig(model_type="mamba", dtype=torch.float32, weight_kind="factors", **SIZES)
    model = MambaForCausalLM(config, TensorParallel.virtual(0, n), device="meta")
    rows = {row.name: row for row in rows_of(model, n)}
    in_proj = rows["backbone.layers.0.mixer.in_proj.left"]
    assert (in_proj.full_shape, in_proj.local_shape) == ((26, RANK), (2 * -(-13 // n), RANK))
    assert rows["backbone.layers.1.mixer.out_proj.left"].split == "replicated"
    assert not any("proj.weight" in name for name in rows)


class Other(Dense):
    pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_weight_kind("x", Factors), "pass an instance of a LinearWeight"),  # type: ignore[arg-type]
        (
            lambda: register_weight_kind("factors", Other()),
            "'factors' is Factors already: register Other under",
        ),
        (
            lambda: ColumnParallelLinear(4, 4, weight_kind="fp5"),
            "unknown weight kind 'fp5': there are dense, (.*, )?factors;",
        ),
        (
            lambda: unregister_weight_kind("fp5"),
            "unknown weight kind 'fp5': there are dense, (.*, )?factors;",
        ),
        (lambda: unregister_weight_kind("dense"), "'dense' cannot be removed: layers that name no kind"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
