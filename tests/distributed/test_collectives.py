"""The four collectives against their definition, forward and backward, on real gloo ranks."""

from __future__ import annotations

import pytest
import torch

from tp_mamba.parallel.collectives import copy_to_tp, gather_from_tp, reduce_from_tp, scatter_to_tp
from tp_mamba.parallel.group import RankFailedError, TensorParallel


def _rank_tensor(rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A closed form that differs on every rank, so that the parent can compute what to expect."""
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape) + 1) * (rank + 1) ** 2


def _forward_and_gradient(
    tp: TensorParallel, name: str, shape: tuple[int, ...], dim: int
) -> tuple[torch.Tensor, ...]:
    x = _rank_tensor(tp.rank, shape).requires_grad_()
    before = x.detach().clone()
    function = {
        "copy": lambda: copy_to_tp(x, tp),
        "reduce": lambda: reduce_from_tp(x, tp),
        "gather": lambda: gather_from_tp(x, tp, dim),
        "scatter": lambda: scatter_to_tp(x, tp, dim),
    }[name]
    y = function()
    y.backward(_rank_tensor(tp.rank, tuple(y.shape)) / 7)
    assert torch.equal(x.detach(), before), "the input was changed"
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("name", "dim"),
    [("copy", 0), ("reduce", 0), ("gather", 0), ("gather", -1), ("scatter", 0), ("scatter", -1)],
)
def test_forward_and_backward(ranks, n: int, name: str, dim: int) -> None:
    shape = (12, 24)
    xs = [_rank_tensor(r, shape) for r in range(n)]
    results = ranks(n).run(_forward_and_gradient, name, shape, dim)
    out_shape = tuple(results[0][0].shape)
    gradients = [_rank_tensor(r, out_shape) / 7 for r in range(n)]
    for r, (y, dx) in enumerate(results):
        expected_y, expected_dx = {
            "copy": lambda r=r: (xs[r], sum(gradients)),
            "reduce": lambda r=r: (sum(xs), gradients[r]),
            "gather": lambda r=r: (torch.cat(xs, dim), gradients[r].chunk(n, dim)[r]),
            "scatter": lambda r=r: (xs[r].chunk(n, dim)[r], torch.cat(gradients, dim)),
        }[name]()
        torch.testing.assert_close(y, expected_y, rtol=1e-15, atol=0)
        torch.testing.assert_close(dx, expected_dx, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_reduce_and_gather(ranks, dtype: torch.dtype) -> None:
    for total, joined in ranks(2).run(_reduce_and_gather, dtype):
        assert torch.equal(total, torch.full((3, 5), 3, dtype=dtype))
        assert torch.equal(
            joined, torch.cat([torch.full((3, 5), r + 1, dtype=dtype) for r in range(2)], dim=-1)
        )


def _reduce_and_gather(tp: TensorParallel, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.full((3, 5), tp.rank + 1, dtype=dtype)
    return reduce_from_tp(x, tp), gather_from_tp(x, tp)


def test_scatter_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="cannot scatter dim -1 of size 7 over 3 ranks"):
        scatter_to_tp(torch.zeros(2, 7), TensorParallel.virtual(0, 3))


def _agree(tp: TensorParallel, failing: int | None) -> str:
    try:
        tp.agree(OSError("no space") if tp.rank == failing else None)
    except (OSError, RankFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_agree_tells_every_rank_what_happened(ranks) -> None:
    assert ranks(3).run(_agree, None) == ["fine"] * 3
    told = "RankFailedError: rank 1 of 3 failed: OSError: no space"
    assert ranks(3).run(_agree, 1) == [told, "OSError: no space", told]


def _from_mesh(tp: TensorParallel) -> tuple[int, int, str]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, tp.size), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="a mesh with 2 axes"):
        TensorParallel.from_mesh(mesh)
    made = TensorParallel.from_mesh(mesh["tp"])
    return made.rank, made.size, made.backend


def test_from_mesh(ranks) -> None:
    assert ranks(2).run(_from_mesh) == [(0, 2, "gloo"), (1, 2, "gloo")]


def _from_env(tp: TensorParallel) -> list[str]:
    """``from_env`` in a process whose program has initialised torch.distributed itself."""
    environment = {"RANK": str(tp.rank), "WORLD_SIZE": str(tp.size), "LOCAL_RANK": str(tp.rank)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        made = [repr(TensorParallel.from_env()), repr(TensorParallel.from_env("gloo"))]
        with pytest.raises(
            ValueError, match=r"backend='nccl' but torch.distributed is initialised with 'gloo'"
        ):
            TensorParallel.from_env("nccl")
    return made


def test_from_env_takes_the_group_that_exists(ranks) -> None:
    for rank, made in enumerate(ranks(2).run(_from_env)):
        assert made == [f"TensorParallel(rank={rank}, size=2, backend='gloo', device='cpu')"] * 2


def test_from_env_refuses_nccl_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match='backend="nccl" but torch finds no GPU'):
        TensorParallel.from_env("nccl")


def test_one_rank_without_torchrun_and_virtual_ranks() -> None:
    tp = TensorParallel.from_env()
    assert (tp.rank, tp.size, tp.backend) == (0, 1, "none")
    with pytest.raises(ValueError, match="rank 4 of 4 does not exist"):
        TensorParallel.virtual(4, 4)
    with pytest.raises(RuntimeError, match="can plan and slice, but not communicate"):
        TensorParallel.virtual(1, 4).all_reduce_(torch.zeros(1))
