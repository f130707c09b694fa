"""What the tests of the convolution and of RMSNorm share: where kernels run, errors, compilation."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_interpreter import repair

# "interpreter": the Triton kernels on the CPU; "cpu": the plain-torch path; "cuda": the kernels on a GPU.
INTERPRETER = pytest.param("interpreter", id="interpreter")
CPU = pytest.param("cpu", id="cpu")
CUDA = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)


def run_on(where: str, check: Callable[..., None], *args: Any) -> None:
    """Call ``check(device, *args)``, a module-level function, with the kernels running as ``where`` says.

    Triton decides to interpret when its decorator runs: interpreted kernels live in a process of their own.
    """
    if where == "interpreter":
        _interpreter().submit(_without_grad, check, "cpu", *args).result(timeout=300)
    else:
        _without_grad(check, where, *args)


@functools.cache
def _interpreter() -> concurrent.futures.Executor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, initializer=_start_interpreting)


def _start_interpreting() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)

    repair()


def _without_grad(check: Callable[..., None], *args: Any) -> None:
    with torch.no_grad():
        check(*args)


def assert_as_good(actual: torch.Tensor, exact: torch.Tensor, in_dtype: torch.Tensor) -> None:
    """The error of ``actual`` is at most twice that of the reference computed in its dtype.

    ``exact`` is the float64 reference on the same inputs, ``in_dtype`` the reference run in the dtype of
    ``actual``. A lucky reference may be exact where another order of sums is one rounding off: half a unit in
    the last place of the largest value is always allowed.
    """
    assert actual.dtype == in_dtype.dtype
    assert actual.shape == exact.shape == in_dtype.shape
    assert actual.isfinite().all()
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = (in_dtype.double() - exact).abs().max().item()
    floor = 0.5 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= 2 * max(allowed, floor), f"error {error:.3g}, the reference's own {allowed:.3g}"


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit-equal from a kernel; to 1e-5 from the CPU path, where torch vectorises by shape and stride."""
    if actual.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        assert torch.equal(actual, expected)
        return
    tolerance = max(1e-5, torch.finfo(actual.dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-5)


def poison(x: torch.Tensor) -> torch.Tensor:
    """``x`` filled with NaN, so that an element left unwritten is seen."""
    return x.fill_(float("nan"))


def compile_for_h100(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible_by_16: frozenset[str],
    num_warps: int,
    folder: Path,
) -> tuple[str, int]:
    """PTX and bytes of local memory (spills, stack) of ``kernel`` compiled for sm_90; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16 - set(constants)},
    )
    options = {"num_warps": num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return compiled.asm["ptx"], int(found[1]) + int(found[2])
