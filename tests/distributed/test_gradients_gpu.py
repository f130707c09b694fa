"""Gradients by the kernels of a GPU, against float64 on the CPU; at two ranks over NCCL against one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gradients import (
    CountingCommunicator,
    Tensors,
    draw,
    gradients,
    make_mixer,
    merged,
    normal,
    reference_mixer,
)
from rank_pool import RankPool

from tp_mamba import MambaConfig, MambaForCausalLM
from tp_mamba.batch import packed_sequences
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sequence import SequenceParallel
from tp_mamba.parallel.sharding import sharded_tensors

pytestmark = pytest.mark.gpu

LENGTHS = [37, 1, 130]
T = sum(LENGTHS)
LUCKY = 2 * torch.finfo(torch.float32).eps
"""The loss is a single number, in which a float32 computation may be right by luck; two roundings are granted."""
CONFIG = MambaConfig(
    model_type="mamba",
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    state_size=16,
    conv_kernel=4,
    time_step_rank=8,
    vocab_size=301,
    use_bias=True,
)


def _reference(dtype: torch.dtype) -> Tensors:
    """Plain torch in ``dtype`` on the CPU, parameters and inputs rounded to it but for those held in float32."""
    mixer = make_mixer("large", TensorParallel(device="cpu"))
    p = {}
    for tensor in sharded_tensors(mixer):
        held = torch.promote_types(dtype, torch.float32) if tensor.shard.wide else dtype
        p[tensor.name] = tensor.param.detach().to(held).requires_grad_()
    inputs = {name: tensor if tensor.dtype == dtype else tensor.to(dtype) for name, tensor in p.items()}
    h = normal(T, 64, seed=1, dtype=dtype).requires_grad_()
    y = reference_mixer(mixer, inputs, h, LENGTHS)
    y.backward(normal(T, 64, seed=2, dtype=dtype))
    return {"y": y.detach(), "h": h.grad, **{name: tensor.grad for name, tensor in p.items()}}


def _ours(dtype: torch.dtype, recomputes: bool = False) -> Tensors:
    mixer = make_mixer("large", TensorParallel(device="cuda"), dtype=dtype, device="cuda")
    mixer.recomputes = recomputes
    h = normal(T, 64, seed=1, dtype=dtype).cuda().requires_grad_()
    y = mixer(h, packed_sequences(LENGTHS, "cuda"))
    y.backward(normal(T, 64, seed=2, dtype=dtype).cuda())
    return {name: x.cpu() for name, x in {"y": y.detach(), "h": h.grad, **gradients(mixer)}.items()}


def _errors(found: Tensors, exact: Tensors) -> dict[str, float]:
    return {name: float((found[name].double() - x).norm() / x.norm()) for name, x in exact.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mixer_errs_at_most_twice_as_much_as_plain_torch(dtype: torch.dtype) -> None:
    exact = _reference(torch.float64)
    plain, ours = _errors(_reference(dtype), exact), _errors(_ours(dtype), exact)
    for name, error in ours.items():
        assert error <= 2 * plain[name], f"{name}: {error:.1e}, plain torch {plain[name]:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_has_the_same_bits_and_recomputing_has_them_too(dtype: torch.dtype) -> None:
    first = _ours(dtype)
    for again in (_ours(dtype), _ours(dtype, recomputes=True)):
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def _loss(
    tp: TensorParallel,
    dtype: torch.dtype = torch.float32,
    scattered: bool = False,
    level: int = 0,
    **options: Any,
) -> Tensors:
    communicator = SequenceParallel() if scattered else CountingCommunicator()
    own = TensorParallel(tp.group, device=tp.device, communicator=communicator)
    model = MambaForCausalLM(CONFIG, own, dtype, trainable=True, **options)
    draw(model)
    model.checkpoint_level = level
    ids = torch.randint(0, 301, (T,), generator=torch.Generator().manual_seed(3))
    loss = model.loss(ids, metadata=packed_sequences(LENGTHS, model.device))
    loss.backward()
    if isinstance(communicator, CountingCommunicator) and tp.size == 2 and level == 0:
        assert len(communicator.all_reduced) == 4 * 2 + 2
    return {name: x.cpu() for name, x in {"loss": loss.detach(), **gradients(model)}.items()}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_loss_of_a_model_in_float32_and_its_gradients(level: int) -> None:
    exact = _loss(TensorParallel(device="cpu"), torch.float64)
    plain = _errors(_loss(TensorParallel(device="cpu")), exact)
    for name, error in _errors(_loss(TensorParallel(device="cuda"), level=level), exact).items():
        assert error <= 2 * max(plain[name], LUCKY), f"{name}: {error:.1e}, on the CPU {plain[name]:.1e}"


def test_bfloat16_activations_over_float32_parameters() -> None:
    cuda = TensorParallel(device="cuda")
    found, exact = (
        _loss(cuda, compute_dtype=torch.bfloat16),
        _loss(TensorParallel(device="cpu"), torch.float64),
    )
    plain = _errors(_loss(TensorParallel(device="cpu"), compute_dtype=torch.bfloat16), exact)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    for name, error in _errors(found, exact).items():
        assert error <= 2 * max(plain[name], 2**-9), f"{name}: {error:.1e}, on the CPU {plain[name]:.1e}"


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()


@pytest.mark.multigpu
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
def test_two_gpus_have_the_gradients_of_one(gpus: RankPool, scattered: bool) -> None:
    exact = _loss(TensorParallel(device="cpu"), torch.float64)
    model = MambaForCausalLM(CONFIG, TensorParallel(device="cpu"), trainable=True)
    parts = gpus.run(_loss, scattered=scattered)
    found = {**merged(parts, model), "loss": parts[0]["loss"]}
    plain = _errors(_loss(TensorParallel(device="cuda:0")), exact)
    for name, error in _errors(found, exact).items():
        assert error <= 2 * max(plain[name], LUCKY), f"{name}: {error:.1e}, one GPU {plain[name]:.1e}"
    for level in (1, 2):
        for part, again in zip(parts, gpus.run(_loss, scattered=scattered, level=level), strict=True):
            assert all(torch.equal(again[name], tensor) for name, tensor in part.items())
