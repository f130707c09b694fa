"""Fused sums over two GPUs: each form against the plain one, replays with a late rank, groups, streams, a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_factory import full_forward, save_case
from rank_pool import RankPool

from tp_mamba.kernels.common.remember import key_of
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.fused import FusedCommunicator
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

H, R, N, EPS = 4096, 256, 16, 1e-5


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()


def terms(tp: TensorParallel, *shape: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Every rank's term, the same on all ranks."""
    generator = torch.Generator(tp.device).manual_seed(seed + sum(shape))
    return [torch.randn(shape, generator=generator, device=tp.device).to(dtype) for _ in range(tp.size)]


def added(parts: list[torch.Tensor]) -> torch.Tensor:
    """In rank order, in float32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def equal(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(key_of(a) == key_of(e) and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@torch.no_grad()
def _every_form(tp: TensorParallel, dtype: torch.dtype) -> list[str]:
    assert isinstance(tp.communicator, FusedCommunicator)
    assert tp.communicator.prepare(tp)
    wrong = []
    weight = torch.rand(H, device=tp.device).to(dtype)
    dist.broadcast(weight, 0)
    for T in (1, 2, 7, 32, 129, 256, 257, 600, 3000):
        parts = terms(tp, T, H, dtype=dtype)
        total = added(parts)
        if not torch.equal(Partial(parts[tp.rank].clone(), tp).sum(), total):
            wrong.append(f"sum, {T} rows")
        for bias in (None, weight):
            for residual in (None, total.float() * 3, total * 3):
                wide = residual is None or residual.dtype == torch.float32
                got = Partial(parts[tp.rank].clone(), tp, bias).add_and_norm(
                    residual, weight, EPS, residual_in_fp32=wide
                )
                whole = total if bias is None else total + bias
                if not equal(got, add_rms_norm(whole, residual, weight, EPS, residual_in_fp32=wide)):
                    wrong.append(f"norm, {T} rows, residual {residual is not None}, bias {bias is not None}")
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_and_norms_have_the_bits_of_the_plain_ones(gpus: RankPool, dtype: torch.dtype) -> None:
    assert gpus.run(_every_form, dtype, timeout=300) == [[], []]


@torch.no_grad()
def _splits(tp: TensorParallel) -> list[str]:
    wrong = []
    for T, slices in ((1, 1), (1, 16), (5, 16), (32, 32), (128, 16), (129, 1), (2000, 1), (6000, 1)):
        parts = terms(tp, slices, T, R + 2 * N, dtype=torch.float32)
        sums = [Partial(part, tp, sliced=True).added_slices() for part in parts]
        value = parts[tp.rank] if slices > 1 else sums[tp.rank]
        options = {
            "dt_weight": None,
            "b_weight": None,
            "c_weight": None,
            "eps": EPS,
            "dt_dtype": torch.bfloat16,
        }
        got = Partial(value.clone(), tp, sliced=slices > 1).split(R, N, **options)
        if not equal(got, split_dt_bc(added(sums), R, N, **options)):
            wrong.append(f"{T} rows in {slices} slices")
    return wrong


def test_splits_have_the_bits_of_the_plain_ones(gpus: RankPool) -> None:
    assert gpus.run(_splits) == [[], []]


@torch.no_grad()
def _replays(tp: TensorParallel, count: int) -> int:
    """Elements that differ from what they should be, over so many replays with one rank late now and then."""
    shapes = {"few": (3, H), "many": (700, H)}
    parts = {name: terms(tp, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    given = {name: torch.empty_like(part[0]) for name, part in parts.items()}
    narrow = torch.empty(5, R + 2 * N, device=tp.device)
    residual = torch.zeros(3, H, device=tp.device)

    def step() -> tuple[torch.Tensor, ...]:
        options = {
            "dt_weight": None,
            "b_weight": None,
            "c_weight": None,
            "eps": None,
            "dt_dtype": torch.float32,
        }
        _, new = Partial(given["few"], tp).add_and_norm(residual, None, EPS, residual_in_fp32=True)
        dt, _, _ = Partial(narrow, tp).split(R, N, **options)
        _, many = Partial(given["many"], tp).add_and_norm(None, None, EPS, residual_in_fp32=False)
        return new, dt, many

    tp.communicator.prepare(tp)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new, dt, many = step()
    wrong = torch.zeros((), dtype=torch.int64, device=tp.device)
    for i in range(count):
        factor = float(2 ** (i % 5) * (-1) ** i)  # exact: the sum is that many times the sum
        for name, part in parts.items():
            torch.mul(part[tp.rank], factor, out=given[name])
        narrow.fill_(float(i + tp.rank))
        if i % 7 == tp.rank:
            torch.cuda._sleep(300_000 if i % 2 else 20_000)
        graph.replay()
        wrong += (new != added(parts["few"]).float() * factor).sum() + (dt != 2 * i + 1).sum()
        wrong += (many != added(parts["many"]) * factor).sum()
        if i % 100 == 0:  # an eager sum in between counts rounds as well
            step()
    return int(wrong)


def test_thousands_of_replays_with_a_late_rank(gpus: RankPool) -> None:
    assert gpus.run(_replays, 2000, timeout=300) == [0, 0]


@torch.no_grad()
def _two_groups_and_streams(tp: TensorParallel) -> list[str]:
    other = TensorParallel(dist.new_group([0, 1]))
    wrong = []
    if not (tp.communicator.prepare(tp) and other.communicator.prepare(other)):
        wrong.append("a group has no memory of its own")
    parts = terms(tp, 40, H, dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for i in range(60):
        for group, stream in ((tp, streams[i % 2]), (other, streams[2]), (tp, streams[(i + 1) % 2])):
            with torch.cuda.stream(stream):
                if i % 9 == tp.rank:
                    torch.cuda._sleep(100_000)
                if not torch.equal(Partial(parts[tp.rank].clone(), group).sum(), added(parts)):
                    wrong.append(f"round {i}")
    with pytest.raises(ValueError, match="two process groups"):
        tp.communicator.prepare(other)
    return wrong


def test_two_groups_and_several_streams(gpus: RankPool) -> None:
    assert gpus.run(_two_groups_and_streams) == [[], []]


def _model(
    tp: TensorParallel, folder: Path, ids: torch.Tensor, dtype: torch.dtype, fused: bool
) -> torch.Tensor:
    own = TensorParallel(tp.group, communicator=tp.communicator if fused else Communicator())
    with torch.no_grad():
        return MambaForCausalLM.from_pretrained(folder, own, dtype=dtype)(ids).cpu()


@pytest.mark.parametrize("name", ["falcon-mamba", "mamba-biased-untied"])
def test_a_model_errs_no_more_with_fused_sums(gpus: RankPool, name: str, tmp_path: Path) -> None:
    oracle = save_case(name, tmp_path)
    ids = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(5))
    exact = full_forward(oracle.bfloat16().float(), ids)
    fused = gpus.run(_model, tmp_path, ids, torch.bfloat16, True)
    plain = gpus.run(_model, tmp_path, ids, torch.bfloat16, False)
    assert torch.equal(fused[0], fused[1])
    assert torch.equal(fused[0], gpus.run(_model, tmp_path, ids, torch.bfloat16, True)[0])
    assert (fused[0] - exact).norm() <= 2 * (plain[0] - exact).norm()
