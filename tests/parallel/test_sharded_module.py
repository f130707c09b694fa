"""The table and the weight loaders survive whatever replaces a module or its parameters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tp_mamba.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear
from tp_mamba.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from tp_mamba.mixer import MambaMixer
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors


def make_mixer(tp: TensorParallel | None = None, device: str = "cpu") -> MambaMixer:
    torch.manual_seed(0)
    return MambaMixer(6, 4, 3, 10, 2, True, True, True, prefix="m", tp=tp, device=device)


def pickled(mixer: MambaMixer) -> MambaMixer:
    buffer = io.BytesIO()
    torch.save(mixer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_meta(mixer: MambaMixer) -> MambaMixer:
    return make_mixer(device="meta").to_empty(device="cpu")


def under_meta(mixer: MambaMixer) -> MambaMixer:
    with torch.device("meta"):
        made = make_mixer(device=None)  # type: ignore[arg-type]
    assert all(p.is_meta for p in made.parameters())
    return made.to_empty(device="cpu")


def replaced(mixer: MambaMixer) -> MambaMixer:
    for tensor in sharded_tensors(mixer):
        setattr(tensor.module, tensor.attribute, nn.Parameter(torch.zeros_like(tensor.param), False))
    return mixer


def swapped(mixer: MambaMixer) -> MambaMixer:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return mixer.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swapped_state(mixer: MambaMixer) -> MambaMixer:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        mixer.load_state_dict({name: tensor.clone() for name, tensor in mixer.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return mixer


def assigned(mixer: MambaMixer) -> MambaMixer:
    state = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    mixer.load_state_dict(state, assign=True)
    return mixer


WAYS: dict[str, Callable[[MambaMixer], MambaMixer]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": pickled,
    "to_empty": through_meta,
    "device context": under_meta,
    "replaced": replaced,
    "swap_tensors": swapped,
    "load_state_dict(assign)": assigned,
    "load_state_dict(swap_tensors)": swapped_state,
}


@pytest.mark.parametrize("way", list(WAYS))
def test_loading_still_fills_the_module(way: str) -> None:
    mixer = make_mixer()
    made = WAYS[way](mixer)
    h = torch.randn(5, 6)
    full = {t.name: torch.rand_like(t.read()) for t in sharded_tensors(make_mixer())}
    assert [t.name for t in sharded_tensors(made)] == list(full)
    for tensor in sharded_tensors(made):
        tensor.param.weight_loader(tensor.param, full[tensor.name])
    for tensor in sharded_tensors(made):
        assert torch.equal(tensor.read(), full[tensor.name]), tensor.name
    expected = make_mixer()
    for tensor in sharded_tensors(expected):
        tensor.load(full[tensor.name])
    assert torch.equal(made(h), expected(h))


def test_what_a_file_held_is_remembered_by_copies() -> None:
    mixer = make_mixer()
    next(t for t in sharded_tensors(mixer) if t.name == "D").load(torch.ones(10), torch.bfloat16)
    for made in (copy.deepcopy(mixer), pickled(mixer)):
        assert {t.name: t.file_dtype for t in sharded_tensors(made)}["D"] == torch.bfloat16


def test_a_copy_is_filled_and_not_its_original() -> None:
    mixer = make_mixer()
    before, copied = mixer.D.clone(), copy.deepcopy(mixer)
    copied.D.weight_loader(copied.D, torch.full((10,), 5.0))
    assert torch.equal(mixer.D, before)
    assert (copied.D == 5).all()


def test_an_old_parameter_is_not_filled_in_place_of_the_new_one() -> None:
    mixer = make_mixer()
    old = mixer.D
    mixer.D = nn.Parameter(torch.zeros(10), requires_grad=False)
    with pytest.raises(ValueError, match="take the parameter from the module"):
        old.weight_loader(old, torch.ones(10))
    assert not mixer.D.any()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_half_of_in_proj_is_loaded_under_its_shard_id(rank: int) -> None:
    layer = MergedColumnParallelLinear(4, [7, 7], tp=TensorParallel.virtual(rank, 3), prefix="in_proj")
    x, z = torch.randn(7, 4), torch.randn(7, 4)
    layer.weight.weight_loader(layer.weight, z, 1)
    layer.weight.weight_loader(layer.weight, x, 0)
    assert torch.equal(layer.weight, layer.shards["weight"].shard(torch.cat([x, z]), rank, 3))
    with pytest.raises(ValueError, match=r"in_proj.weight: got shard_id 2, it has pieces 0 to 1"):
        layer.weight.weight_loader(layer.weight, x, 2)
    with pytest.raises(ValueError, match=r"got a tensor of shape \[14, 4\], expected the full \[7, 4\]"):
        layer.weight.weight_loader(layer.weight, torch.cat([x, z]), 0)


def test_a_tensor_of_one_piece_has_no_shard_id() -> None:
    layer = ColumnParallelLinear(4, 8, prefix="dt_proj")
    with pytest.raises(ValueError, match="it is one piece: leave shard_id out"):
        layer.weight.weight_loader(layer.weight, torch.zeros(8, 4), 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_is_no_weights_is_refused(dtype: torch.dtype) -> None:
    layer = ColumnParallelLinear(4, 8, prefix="dt_proj")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=rf"dt_proj.weight: got a tensor in {dtype} for a parameter in"):
        layer.weight.weight_loader(layer.weight, torch.zeros(8, 4, dtype=dtype))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("way", ["to_empty", "deepcopy", "torch.save"])
def test_a_tied_head_stays_tied(way: str) -> None:
    device = "meta" if way == "to_empty" else "cpu"
    embedding = VocabParallelEmbedding(9, 4, device=device)
    model = nn.ModuleDict({"embedding": embedding, "head": ParallelLMHead(9, 4, tie_to=embedding)})
    made = {"to_empty": lambda m: m.to_empty(device="cpu"), "deepcopy": copy.deepcopy, "torch.save": pickled}
    model = made[way](model)
    assert model["head"].weight is model["embedding"].weight
    assert [t.name for t in sharded_tensors(model)] == ["embedding.weight"]
    model["embedding"].weight.weight_loader(model["embedding"].weight, torch.ones(9, 4))
    assert (model["head"](torch.ones(1, 4)) == 4).all()


def test_ranks_are_shared_by_copies_and_not_pickled() -> None:
    tp = TensorParallel.virtual(1, 3)
    mixer = make_mixer(tp)
    assert copy.deepcopy(mixer).tp is tp
    made = pickled(mixer)
    assert (made.tp.rank, made.tp.size) == (1, 3)
    with pytest.raises(RuntimeError, match="rank 1 of 3 has no process group"):
        made(torch.zeros(2, 6))
    assert pickled(make_mixer()).tp.size == 1
