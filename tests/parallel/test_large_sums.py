"""Large sums behind products: the layers around them, interpreted between ranks that share memory."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from all_reduce_testing import Schedule, run_ranks
from conv_norm_testing import run_on

from tp_mamba.kernels.all_reduce.shares import Shares
from tp_mamba.kernels.linear.launch import MAX_ROWS
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.layers.linear import ColumnParallelLinear, RowParallelLinear
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.layers.weights import Dense, register_weight_kind, unregister_weight_kind
from tp_mamba.parallel import fused, large
from tp_mamba.parallel.fused import FusedCommunicator
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.large import LargeSums
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.partial import Lent, Partial, whole

H, D, EPS, ROOM = 8, 12, 1e-5, 1 << 12


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Small ones: products of them are exact in float32, in whatever order and pieces they are summed."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


class Rounding(Dense):
    """A product of what is rounded to integers first."""

    def product(
        self, layer: ShardedModule, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().product(layer, x.round(), bias)


def rank_of(shares: Shares) -> TensorParallel:
    """A rank whose sums go by shares wherever they may."""
    tp = TensorParallel.virtual(shares.rank, shares.size)
    tp.communicator = communicator = FusedCommunicator()
    communicator._large, communicator._order = LargeSums(shares), mock.Mock()
    communicator._serving = mock.Mock()  # type: ignore[method-assign]  # without a GPU it would serve none
    return tp


class Block:
    """A norm, a column-parallel and a row-parallel product; and the same with whole weights on one rank."""

    def __init__(self, tp: TensorParallel, seed: int) -> None:
        self.norm = RMSNorm(H, EPS, tp=tp)
        options = {"tp": tp, "dtype": torch.float32, "weight_kind": "rounding"}
        self.wide = ColumnParallelLinear(H, D, bias=False, **options)
        self.narrow = RowParallelLinear(D, H, bias=seed == 1, **options)
        self.weights = integers(D, H, seed=seed), integers(H, D, seed=seed + 50)
        for layer, weight in zip((self.wide, self.narrow), self.weights, strict=True):
            layer.weight.weight_loader(layer.weight, weight)
        if self.narrow.bias is not None:
            self.narrow.bias.fill_(3.0)

    def partial(self, x: torch.Tensor | Lent) -> Partial:
        return self.narrow.partial(self.wide(x))

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        y = x.round() @ self.weights[0].T @ self.weights[1].T
        return y if self.narrow.bias is None else y + 3.0


def a_stack(shares: Shares, schedule: Schedule, T: int) -> None:
    """From an embedding's terms through blocks whose norms take rows or, in the midst, want all that is whole."""
    tp = rank_of(shares)
    terms = [integers(T, H, seed=200 + r) for r in range(shares.size)]
    partial, residual, kept = Partial(terms[tp.rank].clone(), tp), None, None
    y = sum(terms[1:], terms[0])
    for seed, by_rows in enumerate((True, True, False, True)):
        block = Block(tp, seed)
        # What a collective would gather of the residual.
        padded = None if kept is None else torch.cat([kept, kept.new_zeros(-T % tp.size, H)])
        tp.all_gather = mock.Mock(return_value=padded)  # type: ignore[method-assign]
        normed, residual = block.norm.add(partial, residual, by_rows=by_rows)
        expected, kept = add_rms_norm(y, kept, block.norm.weight, EPS)
        assert tp.all_gather.called == (not by_rows)
        assert isinstance(normed, Lent) == by_rows
        assert len(residual) == (-(-T // tp.size) if by_rows else T)
        partial = block.partial(normed)
        assert partial.begun == T
        assert by_rows or torch.equal(normed, expected)
        y = block.alone(expected)
    assert torch.equal(partial.sum(), y)


def sums_inside_sums(shares: Shares, schedule: Schedule, T: int) -> None:
    """A sum that begins while another has not ended goes another way; rows that nobody took are waited for."""
    tp = rank_of(shares)
    terms = [integers(T, H, seed=300 + r) for r in range(tp.size)]
    total, norm = sum(terms[1:], terms[0]), RMSNorm(H, EPS, tp=tp)
    begin = lambda: tp.communicator.begin(lambda x: x, terms[tp.rank], H, tp, None)  # noqa: E731
    first, second = begin(), begin()
    assert (first.begun, second.begun) == (T, None)
    normed, _ = norm.add(first, None, by_rows=True)
    third = begin()
    assert third.begun == T
    assert torch.equal(third.sum(), total)
    normed, _ = norm.add(begin(), None, by_rows=True)
    assert isinstance(normed, Lent)
    assert normed.shape == (T, H)
    assert torch.equal(whole(normed, tp), add_rms_norm(total, None, norm.weight, EPS)[0])
    with torch.enable_grad():
        assert begin().begun is None, "there is no gradient"


def check(device: str, size: int, seeds: int) -> None:
    register_weight_kind("rounding", Rounding())
    with mock.patch.object(large, "LEAST_BYTES", 1), mock.patch.object(fused, "LEAST_BYTES", 1):
        for seed in range(seeds):
            run_ranks(size, a_stack, 7, seed=seed, room=ROOM)
        run_ranks(size, sums_inside_sums, 5, seed=1, room=ROOM)
    unregister_weight_kind("rounding")


@pytest.mark.parametrize("size", [2, 3])
def test_layers_around_sums_by_shares_give_what_one_rank_gives(size: int) -> None:
    run_on("interpreter", check, size, 4 - size)


def test_a_product_is_written_where_it_is_to_be() -> None:
    for M in (5, MAX_ROWS + 2):
        layer, x = ColumnParallelLinear(24, 16, bias=M == 5).requires_grad_(False), torch.randn(M, 24)
        out = torch.full((M + 2, 16), -1.0)
        layer.kind.product_into(out[1:-1], layer, x, layer.bias)
        torch.testing.assert_close(out[1:-1], layer(x))
        assert (out[[0, -1]] == -1).all()


class _Event:
    """Stands in for a CUDA event."""

    def record(self, stream: _Stream) -> None:
        self.name = stream.name


class _Stream:
    """Stands in for a CUDA stream, and writes down who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, None

    def wait_event(self, event: _Event) -> None:
        self.log.append(f"{self.name} behind {event.name}")


@pytest.mark.parametrize("behind_a_product", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_whoever_waits_for_copies_has_had_them_wait_before(
    behind_a_product: bool, normed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured stream may wait only for what is captured with it; and no copy is left out of the graph."""
    log: list[str] = []
    main, T, capturing = _Stream("main", log), 6, False
    memory = (torch.zeros(ROOM, dtype=torch.uint8),) * 2
    words = [mock.Mock(rank=0, rounds=torch.zeros(1, dtype=torch.int32)) for _ in range(2)]
    sums, tp = LargeSums(Shares(memory, memory, *words)), TensorParallel.virtual(0, 2)
    sums._side = _Stream("copies", log)  # type: ignore[assignment]
    sums._forked, sums._joined = _Event(), _Event()  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(large, "LEAST_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(log.append("on " + stream.name)))
    for name in (
        "send_terms", "tell_terms_sent", "wait_for_terms", "send_rows", "tell_rows_sent", "wait_for_rows"
    ):  # fmt: skip
        monkeypatch.setattr(large, name, lambda *_, name=name: log.append(name))
    rows = torch.zeros(T, H)
    monkeypatch.setattr(large, "add_shares", lambda *_, **__: rows)
    monkeypatch.setattr(large, "add_shares_rms_norm", lambda *_, **__: (rows, rows))

    x = torch.zeros(T, H)
    partial = sums.begin(lambda x: x, x, tp, None) if behind_a_product else sums.begun(Partial(x, tp))
    if normed:
        result, _ = sums.add_and_norm(partial, None, None, EPS, residual_dtype=torch.float32)
        result.wait()
        result.wait()
    else:
        sums.sum(partial)
    fork, join = ["copies behind main", "on copies"], ["main behind copies"]
    terms = [*fork, "send_terms", "tell_terms_sent", *join, "wait_for_terms"]
    assert log == [*terms, *fork, "send_rows", "tell_rows_sent", *join, "wait_for_rows"]

    # A capture that fails leaves nothing to be waited for, in whichever part of a sum it does.
    capturing = True
    partial = sums.begun(Partial(x, tp))
    assert not sums.takes(T, H, x.dtype)
    if normed:
        sums.add_and_norm(partial, None, None, EPS, residual_dtype=torch.float32)
    capturing = False
    assert sums.takes(T, H, x.dtype)
    del log[:]
    sums.begun(Partial(x, tp))
    assert log == [*fork, "send_terms", "tell_terms_sent"]
    assert not sums.takes(T, H, x.dtype), "one that runs is not forgotten"
