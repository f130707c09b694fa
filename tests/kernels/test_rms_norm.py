"""RMSNorm and RMSNorm with residual add: CPU path, interpreted kernel, and kernel on a GPU (marked gpu)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_norm_testing import CPU, CUDA, INTERPRETER, assert_as_good, assert_same, run_on
from kernel_testing import Launches, compile_as_launched, specialization, stack_bytes

from tp_mamba.kernels.rms_norm import add_rms_norm, rms_norm
from tp_mamba.kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference

EVERYWHERE = [CPU, INTERPRETER, CUDA]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    # Rows of very different size, as in a trained residual stream; some far below eps.
    scale = torch.logspace(-4, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def check_rms_norm(device: str, dtype: torch.dtype) -> None:
    for shape in [(7, 16), (3, 5, 33), (4, 1), (2, 4096), (1, 16384), (0, 8)]:
        x = randn(*shape, dtype=dtype, device=device)
        for weight in (None, randn(shape[-1], dtype=dtype, device=device) + 1):
            for out_dtype in (None, torch.float32):
                actual = rms_norm(x, weight, EPS, out_dtype=out_dtype)
                exact = rms_norm_reference(x.double(), None if weight is None else weight.double(), EPS)
                assert_as_good(actual, exact, rms_norm_reference(x, weight, EPS, out_dtype=out_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_rms_norm_is_as_good_as_its_dtype(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_rms_norm, dtype)


def check_add_rms_norm(device: str, dtype: torch.dtype) -> None:
    for shape in [(6, 33), (2, 3, 64), (2, 8192)]:
        x = randn(*shape, dtype=dtype, device=device)
        weight = randn(shape[-1], dtype=dtype, device=device) + 1
        for keep in (True, False):
            for residual_dtype in (None, torch.float32, dtype):
                residual = None
                if residual_dtype is not None:
                    residual = randn(*shape, dtype=residual_dtype, device=device, seed=1)
                options = {"residual_in_fp32": keep}
                actual = add_rms_norm(x, residual, weight, EPS, **options)
                wide = None if residual is None else residual.double()
                exact = add_rms_norm_reference(x.double(), wide, weight.double(), EPS)
                in_dtype = add_rms_norm_reference(x, residual, weight, EPS, **options)
                assert actual[1].dtype == (torch.float32 if keep else dtype)
                for got, right, rounded in zip(actual, exact, in_dtype, strict=True):
                    assert_as_good(got, right, rounded)
                assert actual[1].data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_add_rms_norm_is_as_good_as_its_dtype(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_add_rms_norm, dtype)


def check_column_slices(device: str) -> None:
    """The norms of dt, B and C read columns of one tensor p [T, R + 2N], whatever its row length."""
    R, N = 21, 5
    p = randn(9, R + 2 * N, dtype=torch.float32, device=device)
    for part in p.split([R, N, N], dim=-1):
        assert_same(rms_norm(part), rms_norm(part.contiguous()))
    transposed = randn(16, 12, dtype=torch.float32, device=device).t()
    assert_same(rms_norm(transposed), rms_norm(transposed.contiguous()))


@pytest.mark.parametrize("where", [INTERPRETER, CPU])
def test_any_strides(where: str) -> None:
    run_on(where, check_column_slices)


def check_strides_on_gpu(device: str) -> None:
    R, N = 256, 16
    p = randn(300, R + 2 * N, dtype=torch.float32, device=device)
    for part in p.split([R, N, N], dim=-1):
        assert_same(rms_norm(part), rms_norm(part.contiguous()))
    odd = randn(300, 61, dtype=torch.float32, device=device)[:, 3:40]
    assert_as_good(rms_norm(odd), rms_norm_reference(odd.double()), rms_norm_reference(odd))


@pytest.mark.parametrize("where", [CUDA])
def test_any_strides_on_gpu(where: str) -> None:
    run_on(where, check_strides_on_gpu)


def check_rows_do_not_depend_on_the_batch(device: str) -> None:
    for H in (16, 300, 2048):
        x = randn(67, H, dtype=torch.bfloat16, device=device)
        residual = randn(67, H, dtype=torch.float32, device=device, seed=3)
        whole = add_rms_norm(x, residual, None)
        for row in (0, 31, 66):
            one = add_rms_norm(x[row : row + 1], residual[row : row + 1], None)
            assert torch.equal(one[0][0], whole[0][row])
            assert torch.equal(one[1][0], whole[1][row])


@pytest.mark.parametrize("where", [INTERPRETER, CUDA])
def test_rows_do_not_depend_on_the_batch(where: str) -> None:
    run_on(where, check_rows_do_not_depend_on_the_batch)


def test_float64_is_computed_in_float64() -> None:
    x, residual = torch.randn(2, 5, 40, dtype=torch.float64).unbind(0)
    normed, kept = add_rms_norm(x, residual, None)
    exact = x + residual
    torch.testing.assert_close(normed, exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt())
    assert kept.dtype == torch.float64


def check_new_row_counts_do_not_recompile(device: str) -> None:
    from tp_mamba.kernels.rms_norm.any import _rms_norm_kernel

    def variants() -> int:
        return sum(len(cache[0]) for cache in _rms_norm_kernel.device_caches.values())

    rms_norm(torch.randn(5, 48, device=device))
    before = variants()
    for rows in (1, 2, 16, 33, 1000):
        rms_norm(torch.randn(rows, 48, device=device))
    assert variants() == before > 0


@pytest.mark.parametrize("where", [CUDA])
def test_new_row_counts_do_not_recompile(where: str) -> None:
    run_on(where, check_new_row_counts_do_not_recompile)


def record(
    monkeypatch: pytest.MonkeyPatch,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[Any, Any]:
    """The kernel, and the launch that a call would make on a Hopper GPU."""
    from tp_mamba.kernels.rms_norm import any as module

    kernel, launches = module._rms_norm_kernel, Launches()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_rms_norm_kernel", launches)
        patch.setattr("tp_mamba.kernels.rms_norm.use_triton", lambda x: True)
        patch.setattr("tp_mamba.kernels.common.dependent_launch.has_dependent_launch", lambda device: True)
        add_rms_norm(x, residual, weight)
    (launch,) = launches.calls
    return kernel, launch


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize("H", [16, 4096, 16384])
def test_kernel_compiles_for_sm90_vectorised_without_spills(
    H: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As it is launched: all that is read and written, in accesses of 16 bytes."""
    x, residual, weight = torch.zeros(5, H).bfloat16(), torch.zeros(5, H), torch.zeros(H).bfloat16()
    compiled = compile_as_launched(*record(monkeypatch, x, residual, weight))
    assert stack_bytes(compiled, tmp_path) == 0
    accesses = re.findall(r"\b((?:ld|st)\.global\S*)", compiled.asm["ptx"])
    assert {*accesses} == {"ld.global.v4.b32", "st.global.v4.b32"}
    # A thread's elements: of 2 bytes those of x, weight and output, of 4 those of both residuals.
    each = max(1024, H) // (32 * compiled.metadata.num_warps)
    assert accesses.count("ld.global.v4.b32") == (2 * 2 * each + 4 * each) // 16
    assert accesses.count("st.global.v4.b32") == (2 * each + 4 * each) // 16


def test_one_compilation_for_all_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for rows in (1, 2, 16, 33, 1000):
        x, residual = torch.zeros(rows, 64).bfloat16(), torch.zeros(rows, 64)
        keys.add(specialization(*record(monkeypatch, x, residual, torch.zeros(64))))
    assert len(keys) == 1


def test_operators_pass_opcheck() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.library.opcheck(torch.ops.tp_mamba.rms_norm.default, (x, weight, EPS, torch.bfloat16))
    for residual in (None, torch.randn(3, 8)):
        arguments = (x.bfloat16(), residual, None, EPS, torch.float32, torch.bfloat16)
        torch.library.opcheck(torch.ops.tp_mamba.add_rms_norm.default, arguments)


def test_compiles_as_one_graph() -> None:
    def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed, residual = add_rms_norm(x, residual, weight)
        return rms_norm(normed[:, :3]).sum() + residual.sum()

    arguments = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), block(*arguments))


def test_refuses_wrong_input() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        rms_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x has shape \[3, 0\]"):
        rms_norm(x[:, :0])
    with pytest.raises(ValueError, match=r"weight has shape \[7\]: expected \[8\]"):
        rms_norm(x, torch.randn(7))
    with pytest.raises(ValueError, match=r"residual has shape \[2, 8\]: expected that of x, \[3, 8\]"):
        add_rms_norm(x, torch.randn(2, 8), None)
    with pytest.raises(ValueError, match=r"out_dtype is torch.int32"):
        rms_norm(x, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"x has dtype torch.int64"):
        rms_norm(x.long(), out_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight has dtype torch.int64"):
        rms_norm(x, torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"residual is on meta but x is on cpu"):
        add_rms_norm(x, x.to("meta"), None)
