"""Another way to finish a Partial, given from outside: every rank's term is gathered, and added in rank order."""

from __future__ import annotations

import copy

import pytest
import torch

from tp_mamba import MambaConfig, MambaForCausalLM
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.layers.linear import RowParallelLinear
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.parallel.collectives import Ranks
from tp_mamba.parallel.communicate import Communicator, counted
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial
from tp_mamba.parallel.sharding import Shard

SIZES = {"hidden_size": 8, "intermediate_size": 13, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 3}
CONFIG = MambaConfig(model_type="mamba", time_step_rank=3, vocab_size=19, **SIZES)


class InRankOrder(Communicator):
    """Sums in float64, term after term by rank: the same bits on every rank by construction."""

    def __init__(self) -> None:
        self.norms = 0

    def sum(self, partial: Partial) -> torch.Tensor:
        term = partial.added_slices()
        terms = partial.tp.all_gather(term.unsqueeze(0), dim=0).double()
        total = sum(terms[1:], terms[0]).to(partial.dtype or term.dtype)
        return total if partial.bias is None else total + partial.bias

    def all_reduce_(self, x: torch.Tensor, tp: Ranks) -> torch.Tensor:
        raise AssertionError("a sum was finished in another way")

    def add_and_norm(self, partial, residual, weight, eps, *, residual_in_fp32):  # type: ignore[no-untyped-def]
        self.norms += 1
        return add_rms_norm(partial.sum(), residual, weight, eps, residual_in_fp32=residual_in_fp32)


def _run(tp: TensorParallel, foreign: bool) -> tuple[torch.Tensor, int]:
    communicator = InRankOrder() if foreign else None
    own = TensorParallel(tp.group, device="cpu", communicator=communicator)
    torch.manual_seed(0)
    model = MambaForCausalLM(CONFIG, own, torch.float32)
    logits = model(torch.arange(12).view(2, 6))
    return logits, communicator.norms if communicator is not None else 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_foreign_communicator_finishes_every_sum(ranks, n: int) -> None:
    usual, _ = ranks(n).run(_run, False)[0]
    results = ranks(n).run(_run, True)
    for logits, norms in results:
        assert torch.equal(logits, results[0][0]), "the ranks differ in a bit"
        assert norms == CONFIG.num_hidden_layers + 1
        torch.testing.assert_close(logits, usual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slices", [1, 2, 5, 8])
def test_slices_are_added_in_an_aligned_tree(slices: int) -> None:
    value = torch.randn(slices, 3, 4)
    levels = list(value)
    while len(levels) > 1:
        pairs = [a + b for a, b in zip(levels[::2], levels[1::2], strict=False)]
        levels = pairs + levels[2 * len(pairs) :]
    assert torch.equal(Partial(value, TensorParallel(device="cpu"), sliced=True).sum(), levels[0])


def test_the_bias_comes_after_the_sum_and_the_cast_before_it() -> None:
    value, bias = torch.randn(3, 4), torch.randn(4).bfloat16()
    partial = Partial(value.clone(), TensorParallel(device="cpu"), bias, dtype=torch.bfloat16)
    assert torch.equal(partial.sum(), value.bfloat16() + bias)


def _norm_of_a_partial(tp: TensorParallel) -> bool:
    torch.manual_seed(0)
    layer, norm = RowParallelLinear(9, 4, tp=tp).requires_grad_(False), RMSNorm(4).requires_grad_(False)
    x, residual = torch.randn(5, 9), torch.randn(5, 4)
    x = Shard(shape=(5, 9), dim=1).shard(x, tp.rank, tp.size)
    pairs = zip(norm.add(layer.partial(x), residual), norm.add(layer(x), residual), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_norm_finishes_a_sum_as_it_would_be_alone(ranks, n: int) -> None:
    assert ranks(n).run(_norm_of_a_partial) == [True] * n


def test_collectives_are_counted_and_none_is_sent() -> None:
    tp = TensorParallel.virtual(1, 4)
    before = tp.communicator
    with counted(tp) as traffic:
        tp.all_reduce_(torch.zeros(3, 5))
        assert tp.all_gather(torch.zeros(2, 6), dim=-1).shape == (2, 24)
    assert (traffic.all_reduces, traffic.all_reduce_bytes) == (1, 60)
    assert (traffic.all_gathers, traffic.all_gather_bytes) == (1, 4 * 48)
    assert tp.communicator is before
    assert copy.deepcopy(tp) is tp
