"""Column- and row-parallel layers, the embedding and the head against torch's own, tensor by tensor.

Everything is float64 and compared to 1e-12: at that precision a missing or doubled collective cannot hide. The
sizes do not divide by the number of ranks, so padding is part of every case.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tp_mamba.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from tp_mamba.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import Shard

IN, OUT, ROWS = 10, 14, 5


def _full(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {"x": draw(ROWS, IN), "weight": draw(OUT, IN), "bias": draw(OUT), "dy": draw(ROWS, OUT)}


def _reference(full: dict[str, torch.Tensor], bias: bool) -> dict[str, torch.Tensor]:
    x, weight, b = (full[k].clone().requires_grad_() for k in ("x", "weight", "bias"))
    y = F.linear(x, weight, b if bias else None)
    y.backward(full["dy"])
    found = {"y": y.detach(), "dx": x.grad, "dweight": weight.grad}
    return {**found, "dbias": b.grad} if bias else found


def _output_split(kind: str) -> Shard:
    return Shard(shape=(ROWS, OUT), dim=1, pieces=(OUT // 2,) * 2 if kind == "merged" else ())


def _run_linear(tp: TensorParallel, kind: str, bias: bool, whole: bool) -> dict[str, torch.Tensor]:
    """One rank's output and gradients. ``whole``: gather the output (column), or take the whole input (row)."""
    full = _full()
    make: dict[str, Any] = {
        "column": lambda: ColumnParallelLinear(
            IN, OUT, bias, gather_output=whole, tp=tp, dtype=torch.float64
        ),
        "merged": lambda: MergedColumnParallelLinear(
            IN, [OUT // 2] * 2, bias, gather_output=whole, tp=tp, dtype=torch.float64
        ),
        "row": lambda: RowParallelLinear(
            IN, OUT, bias, input_is_parallel=not whole, tp=tp, dtype=torch.float64
        ),
    }
    layer = make[kind]()
    layer.weight.weight_loader(layer.weight, full["weight"])
    if bias:
        layer.bias.weight_loader(layer.bias, full["bias"])
    x, dy = full["x"], full["dy"]
    if kind == "row" and not whole:
        x = Shard(shape=(ROWS, IN), dim=1).shard(x, tp.rank, tp.size)
    x = x.clone().requires_grad_()
    y = layer(x)
    if kind != "row" and not whole:
        dy = _output_split(kind).shard(dy, tp.rank, tp.size)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "dweight": layer.weight.grad}
    return {**found, "dbias": layer.bias.grad} if bias else found


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["column", "merged", "row"])
def test_linear(ranks, kind: str, whole: bool, bias: bool, n: int) -> None:
    expected = _reference(_full(), bias)
    results = ranks(n).run(_run_linear, kind, bias, whole)
    layer = {
        "column": lambda: ColumnParallelLinear(IN, OUT, bias),
        "merged": lambda: MergedColumnParallelLinear(IN, [OUT // 2] * 2, bias),
        "row": lambda: RowParallelLinear(IN, OUT, bias),
    }[kind]()
    merge = layer.shards["weight"].merge
    got = {"dweight": merge([r["dweight"] for r in results])}
    if bias:
        got["dbias"] = layer.shards["bias"].merge([r["dbias"] for r in results])
    if kind == "row" and not whole:
        got["dx"] = torch.cat([r["dx"] for r in results], -1)[:, :IN]
    if kind != "row" and not whole:
        got["y"] = _output_split(kind).merge([r["y"] for r in results])
    for key, value in expected.items():
        if key in got:
            torch.testing.assert_close(
                got[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
            )
        else:  # replicated: right, and the same bits, on every rank
            for result in results:
                torch.testing.assert_close(result[key], value, rtol=1e-12, atol=1e-12)
                assert torch.equal(result[key], results[0][key]), key


def _run_options(tp: TensorParallel) -> dict[str, Any]:
    """``skip_bias_add`` and ``reduce_results``: the parts a caller is left to put together."""
    full = _full()
    column = ColumnParallelLinear(
        IN, OUT, skip_bias_add=True, bias_in_float32=True, tp=tp, dtype=torch.bfloat16
    )
    column.bias.weight_loader(column.bias, full["bias"])
    y, bias = column(full["x"].bfloat16())
    row = RowParallelLinear(IN, OUT, skip_bias_add=True, reduce_results=False, tp=tp, dtype=torch.float64)
    row.weight.weight_loader(row.weight, full["weight"])
    x = Shard(shape=(ROWS, IN), dim=1).shard(full["x"], tp.rank, tp.size)
    partial, row_bias = row(x)
    wide = RowParallelLinear(IN, OUT, bias=False, reduce_in_float32=True, tp=tp, dtype=torch.bfloat16)
    return {
        "column": y.dtype,
        "bias": bias.detach(),
        "partial": partial.detach(),
        "row_bias_is_parameter": row_bias is row.bias,
        "wide": wide(x.bfloat16()).dtype,
    }


def test_parts_left_to_the_caller(ranks) -> None:
    full = _full()
    results = ranks(3).run(_run_options)
    split = ColumnParallelLinear(IN, OUT).shards["bias"]
    assert torch.equal(split.merge([r["bias"] for r in results]), full["bias"].float())
    torch.testing.assert_close(
        sum(r["partial"] for r in results), full["x"] @ full["weight"].t(), rtol=1e-12, atol=1e-12
    )
    for r in results:
        assert (r["column"], r["wide"], r["row_bias_is_parameter"]) == (torch.bfloat16, torch.float32, True)


V, H = 97, 6


def _run_vocab(tp: TensorParallel, tied: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    table, head_table = torch.randn(V, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    embedding = VocabParallelEmbedding(V, H, tp=tp, dtype=torch.float64)
    embedding.weight.weight_loader(embedding.weight, table)
    head = ParallelLMHead(V, H, tie_to=embedding if tied else None, tp=tp, dtype=torch.float64)
    if not tied:
        head.weight.weight_loader(head.weight, head_table)
    ids = torch.tensor([[0, 1, 48, 96], [24, 25, 72, 73]])
    h = embedding(ids)
    logits = head(h)
    generator = torch.Generator().manual_seed(4)
    logits.backward(torch.randn(*logits.shape, generator=generator, dtype=torch.float64))
    found = {"h": h.detach(), "logits": logits.detach(), "dembedding": embedding.weight.grad}
    return found if tied else {**found, "dhead": head.weight.grad}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(ranks, tied: bool, n: int) -> None:
    torch.manual_seed(3)
    table = torch.randn(V, H, dtype=torch.float64).requires_grad_()
    head_table = torch.randn(V, H, dtype=torch.float64).requires_grad_()
    h = F.embedding(torch.tensor([[0, 1, 48, 96], [24, 25, 72, 73]]), table)
    logits = F.linear(h, table if tied else head_table)
    generator = torch.Generator().manual_seed(4)
    logits.backward(torch.randn(*logits.shape, generator=generator, dtype=torch.float64))

    results = ranks(n).run(_run_vocab, tied)
    split = VocabParallelEmbedding(V, H).shards["weight"]
    for result in results:
        assert torch.equal(result["h"], h.detach())
        torch.testing.assert_close(result["logits"], logits.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(result["logits"], results[0]["logits"]), (
            "the ranks disagree on a bit of the logits"
        )
    merged = split.merge([r["dembedding"] for r in results])
    torch.testing.assert_close(merged, table.grad, rtol=1e-12, atol=1e-12)
    if not tied:
        merged = split.merge([r["dhead"] for r in results])
        torch.testing.assert_close(merged, head_table.grad, rtol=1e-12, atol=1e-12)


def _initial_values(tp: TensorParallel) -> list[torch.Tensor]:
    torch.manual_seed(11)
    layers: list[nn.Module] = [
        MergedColumnParallelLinear(IN, [7, 7], tp=tp),
        RowParallelLinear(IN, OUT, tp=tp),
    ]
    return [p.detach() for layer in layers for p in layer.parameters()]


def test_the_same_seed_gives_the_same_model_at_every_rank_count(ranks) -> None:
    whole = _initial_values(TensorParallel())
    splits = [
        shard
        for layer in (MergedColumnParallelLinear(IN, [7, 7]), RowParallelLinear(IN, OUT))
        for shard in layer.shards.values()
    ]
    parts = ranks(3).run(_initial_values)
    for i, split in enumerate(splits):
        assert torch.equal(split.merge([rank[i] for rank in parts]), whole[i])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tp: ColumnParallelLinear(4, 3, tp=tp), "has 3 channels, too few for 4 tensor-parallel ranks"),
        (lambda tp: MergedColumnParallelLinear(4, [3, 3], tp=tp), "has 3 channels, too few for 4"),
        (lambda tp: RowParallelLinear(3, 4, tp=tp), "has 3 channels, too few for 4"),
        (lambda tp: VocabParallelEmbedding(3, 4, tp=tp), "has 3 channels, too few for 4"),
        (lambda tp: MergedColumnParallelLinear(4, [8, 9], tp=tp), "must be one or more equal widths"),
        (
            lambda tp: ColumnParallelLinear(0, 8, tp=tp),
            "input_size 0 and output_size 8 must both be positive",
        ),
        (lambda tp: ColumnParallelLinear(4, 8, bias_in_float32=True, tp=tp), "set skip_bias_add=True"),
        (lambda tp: ColumnParallelLinear(4, 8, True, True, True, tp=tp), "do not go together"),
        (
            lambda tp: RowParallelLinear(8, 4, reduce_results=False, tp=tp),
            "would be added once on every rank",
        ),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(TensorParallel.virtual(0, 4))


def test_weight_loader_refuses_another_shape() -> None:
    layer = ColumnParallelLinear(4, 8, tp=TensorParallel.virtual(1, 4), prefix="in_proj")
    with pytest.raises(
        ValueError, match=r"in_proj.weight: got a tensor of shape \[2, 4\], expected the full \[8, 4\]"
    ):
        layer.weight.weight_loader(layer.weight, torch.zeros(2, 4))


def _float32_sum(tp: TensorParallel) -> torch.Tensor:
    torch.manual_seed(2)
    weight, x = torch.randn(OUT, 64).bfloat16(), torch.randn(ROWS, 64).bfloat16()
    layer = RowParallelLinear(64, OUT, bias=False, reduce_in_float32=True, tp=tp, dtype=torch.bfloat16)
    layer.weight.weight_loader(layer.weight, weight)
    return layer(Shard(shape=(ROWS, 64), dim=1).shard(x, tp.rank, tp.size)).detach()


@pytest.mark.parametrize("n", [1, 3])
def test_a_float32_sum_is_rounded_nowhere(ranks, n: int) -> None:
    """bf16 operands, float32 sum: as exact as float32 is, where bf16 partial sums would be 3 digits off."""
    torch.manual_seed(2)
    weight, x = torch.randn(OUT, 64).bfloat16(), torch.randn(ROWS, 64).bfloat16()
    exact = x.double() @ weight.double().t()
    for y in ranks(n).run(_float32_sum):
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
