"""Launches remembered by form: with the arguments of Triton's own launch, and for that form alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_testing import TRITON_MODULES

from tp_mamba.kernels.all_reduce import Exchange, shares
from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.common import launches
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.dt_proj_state_update import dt_proj_state_update
from tp_mamba.kernels.linear import skinny_linear, skinny_linear_slices
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.rms_norm import add_rms_norm, rms_norm
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_state_update import selective_state_update
from tp_mamba.kernels.split_dt_bc import split_dt_bc


@pytest.fixture(autouse=True)
def remembered(launches_are_described_anew: None, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What is remembered in this test: nothing at first."""
    known: dict[Any, Any] = {}
    monkeypatch.setattr(launches, "_remembered", known)
    return known


class Compiled:
    """Stands in for Triton's compiled kernel: notes the launches, pointers as numbers."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.own: list[tuple[Any, ...]] = []
        """Grid and arguments of launches by Triton's own way."""
        self.remembered: list[tuple[Any, ...]] = []

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        self.own.append(((x, y, z), *map(_number, rest[5:])))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.remembered.append((grid, *map(_number, arguments)))


def _number(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


class Kernel:
    """Stands in for a kernel of two tensors, a size and a constant."""

    arg_names = ("x_ptr", "out_ptr", "size", "BLOCK")

    def __init__(self) -> None:
        self.compiled: Compiled | None = Compiled()
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled | None]:
        def run(*arguments: Any, **named: Any) -> Compiled | None:
            self.launches += 1
            return self.compiled

        return run


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def launch(kernel: Kernel) -> Callable[..., bool]:
    @launcher(tensors=2)
    def describe(x: torch.Tensor, out: torch.Tensor | None, eps: float) -> Launch | None:
        if x.dim() != 2:
            return None
        return Launch(kernel, (x.shape[0],), (x.numel(),), {"num_warps": 4, "BLOCK": x.stride(0)})

    return describe


def test_second_call_of_a_form_takes_the_compiled_kernel(kernel: Kernel, launch: Callable[..., bool]) -> None:
    x, other = torch.zeros(4, 8), torch.ones(4, 8)
    assert launch(x, None, 1.0)
    assert launch(other, None, 1.0)
    assert kernel.launches == 1
    assert kernel.compiled is not None
    assert kernel.compiled.remembered == [((4, 1, 1), other.data_ptr(), None, 32, 8)]


def test_another_form_is_described_anew(kernel: Kernel, launch: Callable[..., bool]) -> None:
    x = torch.zeros(4, 8)
    forms: list[tuple[Any, ...]] = [
        (x, None, 1.0),
        (x[:2], None, 1.0),
        (torch.zeros(8, 4).t(), None, 1.0),
        (x.half(), None, 1.0),
        (x, x, 1.0),
        (x, x.half(), 1.0),
        (x, None, 2.0),
    ]
    for form in forms:
        launch(*form)
    assert kernel.launches == len(forms)
    for form in forms:
        launch(*form)
    assert kernel.launches == len(forms)


def test_pointers_off_16_bytes_are_not_remembered(kernel: Kernel, launch: Callable[..., bool]) -> None:
    """Triton compiles another kernel for them."""
    x, off = torch.zeros(4, 8), torch.zeros(33)[1:].view(4, 8)
    for tensors in ((x, None), (off, None), (off, None), (x, off), (x, off)):
        launch(*tensors, 1.0)
    assert kernel.launches == 5
    launch(x, None, 1.0)
    assert kernel.launches == 5


def test_a_kernel_that_is_compiled_in_the_background(kernel: Kernel, launch: Callable[..., bool]) -> None:
    """It is what ``AsyncCompileMode`` of Triton gives: it has the attributes of the kernel that it becomes."""
    from triton.runtime import _async_compile

    class Future:
        def result(self) -> Compiled | None:
            return finished

    finished = kernel.compiled
    assert finished is not None
    kernel.compiled = _async_compile.FutureKernel(lambda _: None, Future())
    for _ in range(2):
        assert launch(torch.zeros(4, 8), None, 1.0)
    assert kernel.launches == len(finished.remembered) == 1


def test_what_is_not_compiled_is_not_remembered(
    kernel: Kernel, launch: Callable[..., bool], remembered: dict[Any, Any]
) -> None:
    """Triton's interpreter returns no kernel."""
    kernel.compiled = None
    for _ in range(2):
        assert launch(torch.zeros(4, 8), None, 1.0)
    assert kernel.launches == 2
    assert not remembered


def test_a_kernel_that_is_not_for_the_call(kernel: Kernel, launch: Callable[..., bool]) -> None:
    for _ in range(2):
        assert not launch(torch.zeros(8), None, 1.0)
    assert kernel.launches == 0


def test_forms_are_bounded(
    launch: Callable[..., bool], remembered: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "_MOST_FORMS", 3)
    for rows in range(1, 9):
        launch(torch.zeros(rows, 8), None, 1.0)
        assert len(remembered) <= 3
    assert remembered


def _half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _scan(channel_major: bool) -> None:
    u = _half(64, 9) if channel_major else _half(9, 64).t()
    bc = torch.zeros(9, 16).t()
    selective_scan_fn(
        u, u, torch.zeros(8, 64).t(), bc[:8], bc[8:], torch.zeros(64), u, query_start_loc=_ints(0, 4, 9),
        cache_indices=_ints(1, 0), has_initial_state=torch.tensor([True, False]),
        ssm_states=torch.zeros(3, 8, 64).mT, save_states_every=4,
    )  # fmt: skip


def _step(call: Callable[..., Any], *of_dt: torch.Tensor, heads: bool = False) -> None:
    x, A, state = _half(2, 64), torch.zeros(8, 64).t(), torch.zeros(3, 8, 64).mT
    bc = torch.zeros(2, 16)
    rest = (A, bc[:, :8], bc[:, 8:], torch.zeros(64), x)
    if heads:
        x, A, state = x[:, None], A[None], state[:, None]
        of_dt, rest = (of_dt[0][:, None],), (A, *rest[1:3], rest[3][None], x)
    call(state, x, *of_dt, *rest, state_batch_indices=_ints(1, 0))


def _large_sum() -> None:
    words = [Exchange(1, torch.zeros(3, dtype=torch.int64), _ints(0)) for _ in range(2)]
    memory = (torch.zeros(2048, dtype=torch.uint8),) * 3
    group, residual, weight = shares.Shares(memory, memory, *words), torch.zeros(3, 32), torch.zeros(32)
    shares.tell_terms_sent(group)
    shares.add_shares(_half(3, 32), 8, group, bias=_half(32))
    shares.add_shares_rms_norm(_half(3, 32), residual, weight, 1e-5, 8, group, residual_dtype=torch.float32)


CALLS: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: rms_norm(_half(3, 32), torch.zeros(32)),
    "add_rms_norm": lambda: add_rms_norm(_half(3, 32), torch.zeros(3, 32), torch.zeros(32)),
    "split_dt_bc": lambda: split_dt_bc(_half(3, 48), 32, 8, b_weight=torch.zeros(8), eps=1e-5),
    "split_dt_bc, slices": lambda: split_dt_bc(torch.zeros(4, 3, 48), 32, 8, dt_dtype=torch.bfloat16),
    "linear_softplus": lambda: linear_softplus(_half(3, 32), _half(64, 32), torch.zeros(64)),
    "linear_softplus, many": lambda: linear_softplus(_half(4096, 32), _half(1024, 32)),
    "skinny_linear": lambda: skinny_linear(_half(3, 64), _half(64, 64)),
    "skinny_linear, sums": lambda: skinny_linear(_half(3, 4096), _half(64, 4096)),
    "skinny_linear_slices": lambda: skinny_linear_slices(_half(3, 1024), _half(64, 1024)),
    "causal_conv1d_fn": lambda: causal_conv1d_fn(
        _half(9, 64).t(), _half(64, 4), _half(64), activation="silu", query_start_loc=_ints(0, 4, 9),
        cache_indices=_ints(1, 0), conv_states=_half(3, 3, 64).mT,
    ),
    "causal_conv1d_fn, dense": lambda: causal_conv1d_fn(_half(2, 64, 9), _half(64, 3)),
    "causal_conv1d_update": lambda: causal_conv1d_update(
        _half(2, 64), _half(3, 3, 64).mT, _half(64, 4), None, "silu", conv_state_indices=_ints(1, 0)
    ),
    "causal_conv1d_update, any": lambda: causal_conv1d_update(_half(2, 64, 2), _half(3, 64, 5), _half(64, 4)),
    "dt_proj_state_update": lambda: _step(dt_proj_state_update, _half(2, 32), _half(64, 32), torch.zeros(64)),
    "selective_state_update": lambda: _step(selective_state_update, _half(2, 64)),
    "selective_state_update, heads": lambda: _step(selective_state_update, _half(2, 64), heads=True),
    "selective_scan_fn": lambda: _scan(False),
    "selective_scan_fn, any": lambda: _scan(True),
    "all_reduce, shares": _large_sum,
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_those_of_tritons_launch(
    call: str, remembered: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel's, in its order: what Triton binds by name in the first call is passed by place in the second."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    for module in TRITON_MODULES:  # compiled, not interpreted, although the variable is set afterwards
        importlib.import_module(module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(driver, "_active", Driver())
    compiled: list[Compiled] = []
    monkeypatch.setattr(
        jit.JITFunction, "_do_compile", lambda *_, **__: compiled.append(Compiled()) or compiled[-1]
    )
    # The two calls have other tensors: an address stands for what a tensor looks like.
    addresses: dict[Any, int] = {}
    monkeypatch.setattr(
        torch.Tensor,
        "data_ptr",
        lambda x: addresses.setdefault((x.shape, x.stride(), x.dtype), 16 * len(addresses)),
    )
    CALLS[call]()
    assert compiled
    assert [len(kernel.own) for kernel in compiled] == [1] * len(compiled)
    CALLS[call]()
    assert len(remembered) == len(compiled)
    for kernel in compiled:
        assert len(kernel.own) == 1, "the form was not remembered"
        assert kernel.remembered == kernel.own


def _normed(device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm on ``device``, and what it should be up to rounding."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    weight = torch.linspace(0.5, 2.0, 64)
    return rms_norm(x.to(device), weight.to(device)).cpu(), rms_norm(x, weight)


@pytest.mark.gpu
def test_remembered_launch_on_a_gpu(remembered: dict[Any, Any]) -> None:
    """The bits of the first launch, on whatever stream is current, and profilers' hooks see it."""
    from triton import knobs

    first, expected = _normed("cuda", 0)
    torch.testing.assert_close(first, expected)
    assert len(remembered) == 1
    assert torch.equal(_normed("cuda", 0)[0], first)
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        torch.testing.assert_close(*_normed("cuda", 1))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["_rms_norm_kernel"]
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(_normed("cuda", 0)[0], first)
    assert len(remembered) == 1


@pytest.mark.multigpu
def test_launches_go_to_the_device_of_their_tensors(remembered: dict[Any, Any]) -> None:
    """Whichever is the current one, which it stays."""
    for current, device in ((0, 1), (0, 1), (0, 0), (1, 0), (1, 1)):
        with torch.cuda.device(current):
            torch.testing.assert_close(*_normed(f"cuda:{device}", device))
            assert torch.cuda.current_device() == current
    assert len(remembered) == 2
