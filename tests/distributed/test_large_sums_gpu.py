"""Large sums over two GPUs, behind products: bits, replays, a rank late at every point, a model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from model_factory import full_forward, save_case
from rank_pool import RankPool

from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.layers.linear import ColumnParallelLinear, RowParallelLinear
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel import fused, large
from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Lent, Partial, whole

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

H, D, EPS = 4096, 2048, 1e-5


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()


def terms(tp: TensorParallel, T: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every rank's term, the same on all ranks."""
    generator = torch.Generator(tp.device).manual_seed(T)
    return [torch.randn(T, H, generator=generator, device=tp.device).to(dtype) for _ in range(tp.size)]


@torch.no_grad()
def _every_form(tp: TensorParallel, dtype: torch.dtype) -> list[str]:
    assert tp.communicator.prepare(tp)
    wrong = []
    weight = torch.rand(H, generator=torch.Generator(tp.device).manual_seed(1), device=tp.device).to(dtype)
    for T in (1024, 1025, 3001, 8192, 12_000):
        a, b = terms(tp, T, dtype)
        total, mine = (
            (a.float() + b.float()).to(dtype),
            slice(tp.rank * -(-T // 2), (tp.rank + 1) * -(-T // 2)),
        )
        for bias in (None, weight):
            for residual in (None, total.float() * 3, total * 3):
                wide = residual is None or residual.dtype == torch.float32
                partial = Partial((a, b)[tp.rank].clone(), tp, bias, by_rows=True)
                normed, kept = partial.add_and_norm(residual, weight, EPS, residual_in_fp32=wide)
                expected = add_rms_norm(
                    total if bias is None else total + bias, residual, weight, EPS, residual_in_fp32=wide
                )
                fits = T * H * dtype.itemsize <= 80 << 20
                rows = expected[1][mine] if fits else expected[1]
                right = isinstance(normed, Lent) == fits and torch.equal(whole(normed, tp), expected[0])
                if not right or not torch.equal(kept[: len(rows)], rows) or kept[len(rows) :].any():
                    wrong.append(f"{T} rows, residual {residual is not None}, bias {bias is not None}")
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_and_norms_have_the_bits_of_the_plain_ones(gpus: RankPool, dtype: torch.dtype) -> None:
    assert gpus.run(_every_form, dtype, timeout=300) == [[], []]


class Layers:
    """Two times norm, column-parallel and row-parallel product, and a norm at the end."""

    def __init__(self, tp: TensorParallel) -> None:
        torch.manual_seed(0)
        options = {"bias": False, "tp": tp, "dtype": torch.bfloat16, "device": tp.device}
        self.tp = tp
        self.norms = [RMSNorm(H, EPS, tp=tp, dtype=torch.bfloat16, device=tp.device) for _ in range(3)]
        self.wide = [ColumnParallelLinear(H, D, **options) for _ in range(2)]
        self.narrow = [RowParallelLinear(D, H, **options) for _ in range(2)]

    def __call__(self, term: torch.Tensor, late: random.Random | None = None) -> torch.Tensor:
        """The last norm of all rows; by itself a rank is ``late`` at any point between and inside sums."""

        def point() -> None:
            if late is not None and late.random() < 0.3:
                torch.cuda._sleep(late.choice((20_000, 200_000)))

        partial, residual = Partial(term.clone(), self.tp), None
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow, strict=False):
            point()
            normed, residual = norm.add(partial, residual, by_rows=True)
            point()
            y, product = wide(normed), narrow.kind.product
            point()
            slow = lambda _kind, *given, product=product: (point(), product(*given))[1]  # noqa: E731
            with mock.patch.object(type(narrow.kind), "product", slow):
                partial = narrow.partial(y)
            assert partial.begun is not None
        point()
        normed, _ = self.norms[-1].add(partial, residual, by_rows=True)
        return whole(normed, self.tp).clone()


@torch.no_grad()
def _late_and_replayed(tp: TensorParallel, rounds: int, replays: int) -> int:
    """Elements that differ from those of the first call, with a rank late at every point, then in replays."""
    layers, given = Layers(tp), [terms(tp, T, torch.bfloat16)[tp.rank] for T in (1024, 3001)]
    first, late = [layers(term) for term in given], random.Random(tp.rank)
    wrong = torch.zeros((), dtype=torch.int64, device=tp.device)
    for i in range(rounds):
        for term, expected in zip(given, first, strict=True):
            wrong += (layers(term, late if i % 3 != tp.rank else None) != expected).sum()
    torch.cuda.synchronize()
    term, graph = given[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers(term)
    for i in range(replays):
        factor = (1.0, 0.0)[i % 2]  # every other one of zeros: what stood there before would be seen
        torch.mul(given[0], factor, out=term)
        if i % 7 == tp.rank:
            torch.cuda._sleep(300_000 if i % 2 else 20_000)
        graph.replay()
        wrong += (found != first[0] * factor).sum()
        if i % 50 == 0:  # sums beside the graph's, through the same memory
            wrong += (layers(given[1]) != first[1]).sum()
    return int(wrong)


def test_a_rank_may_be_late_at_any_point_and_steps_are_replayed(gpus: RankPool) -> None:
    assert gpus.run(_late_and_replayed, 40, 300, timeout=300) == [0, 0]


@torch.no_grad()
def _same_as_whole_terms(tp: TensorParallel) -> tuple[float, bool]:
    """How far layers are from the same ones whose sums go the way of small ones; and whether the ranks agree."""
    layers, term = Layers(tp), terms(tp, 2048, torch.bfloat16)[tp.rank]
    by_shares = layers(term)
    with mock.patch.object(fused, "LEAST_BYTES", 1 << 40):
        partial, residual = Partial(term.clone(), tp), None
        for norm, wide, narrow in zip(layers.norms, layers.wide, layers.narrow, strict=False):
            normed, residual = norm.add(partial, residual)
            partial = narrow.partial(wide(normed))
            assert partial.begun is None
        plain, _ = layers.norms[-1].add(partial, residual)
    theirs = by_shares.clone()
    dist.broadcast(theirs, 0)
    return float((by_shares.float() - plain.float()).norm() / plain.float().norm()), torch.equal(
        theirs, by_shares
    )


def test_layers_give_what_they_give_with_sums_of_whole_terms(gpus: RankPool) -> None:
    """Up to the library's choice of a product by its number of rows."""
    for difference, ranks_agree in gpus.run(_same_as_whole_terms):
        assert difference < 2**-8
        assert ranks_agree


@torch.no_grad()
def _model(tp: TensorParallel, folder: Path, ids: torch.Tensor, by_shares: bool) -> torch.Tensor:
    own = TensorParallel(tp.group, communicator=tp.communicator if by_shares else Communicator())
    model = MambaForCausalLM.from_pretrained(folder, own, dtype=torch.bfloat16)
    with mock.patch.object(large, "LEAST_BYTES", 1), mock.patch.object(fused, "LEAST_BYTES", 1):
        return model(ids).cpu()


@pytest.mark.parametrize("name", ["falcon-mamba", "mamba-biased-untied"])
def test_a_model_errs_no_more(gpus: RankPool, name: str, tmp_path: Path) -> None:
    oracle = save_case(name, tmp_path)
    ids = torch.randint(97, (3, 23), generator=torch.Generator().manual_seed(5))
    exact = full_forward(oracle.bfloat16().float(), ids)
    by_shares = gpus.run(_model, tmp_path, ids, True)
    plain = gpus.run(_model, tmp_path, ids, False)
    assert torch.equal(by_shares[0], by_shares[1])
    assert (by_shares[0] - exact).norm() <= 2 * (plain[0] - exact).norm()
