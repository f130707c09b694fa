"""How the backward kernels are compiled: without spills, not anew for another batch; and the same bits every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_testing import cotangent
from kernel_testing import Launches, compile_as_launched, specialization, stack_bytes

from tp_mamba.kernels.causal_conv1d import any_backward as conv_any
from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn
from tp_mamba.kernels.causal_conv1d import mixer_backward as conv_mixer
from tp_mamba.kernels.common import partial_sums
from tp_mamba.kernels.linear_softplus import any_backward as softplus
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.rms_norm import any_backward as norm
from tp_mamba.kernels.split_dt_bc import any_backward as split
from tp_mamba.kernels.split_dt_bc import split_dt_bc


def rows(T: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(T, width, dtype=dtype)


def convolution(T: int, *, states: bool, channel_major: bool = False) -> None:
    """Packed, of two or three sequences, 1024 channels."""
    D, S = 1024, 2 + T % 2
    x = torch.empty(1, D, T).bfloat16() if channel_major else rows(T, 2 * D)[None, :, :D].transpose(1, 2)
    dout = torch.empty(1, D, T).bfloat16() if channel_major else rows(T, D)[None].transpose(1, 2)
    weight, bias, starts = rows(D, 4), rows(1, D)[0], torch.zeros(S + 1, dtype=torch.int32)
    state = torch.empty(S, D, 3).bfloat16() if states else None
    borders, owners = torch.zeros(2, T, dtype=torch.int32)
    module = conv_any if channel_major else conv_mixer
    module.launch(torch.empty_like(dout), dout, state, x, weight, bias, True, state, starts, borders, owners)


def initial_states(T: int) -> None:
    D, S = 1024, 2 + T % 2
    x, state = rows(T, D)[None].transpose(1, 2), torch.empty(S, D, 3).bfloat16()
    starts = torch.zeros(S + 1, dtype=torch.int32)
    conv_any.launch_states(torch.empty_like(state), x, state, x, rows(D, 4), None, True, state, starts)


def added_norm(T: int, H: int, wide: bool) -> None:
    stream = rows(T, H, torch.float32 if wide else torch.bfloat16)
    residual = None if wide else rows(T, H)
    dresidual = torch.empty_like(stream) if wide else None
    weight = rows(1, H)[0]
    norm.launch(rows(T, H), dresidual, rows(1, H)[0], rows(T, H), stream, stream, residual, weight, 1e-5)


def split_parts(T: int, weighted: bool) -> None:
    R, N = 256, 16
    weights = [rows(1, size)[0] if weighted else None for size in (R, N, N)]
    dweights = [rows(1, size)[0] for size in (R, N, N)]
    dbc = rows(T, 2 * N, torch.float32)
    split.launch(rows(T, R + 2 * N), *dweights, rows(T, R), dbc, rows(T, R + 2 * N), *weights, 1e-5)


def time_steps(T: int, dtype: torch.dtype) -> None:
    D, R = 1024, 160
    bias = rows(1, D, torch.float32)[0]
    dv, dout, x, weight = (rows(*size, dtype) for size in ((T, D), (T, D), (T, R), (D, R)))
    softplus.launch(dv, torch.empty_like(bias), dout, x, weight, bias)


CASES: list[tuple[Any, str, Callable[[int], None]]] = [
    (conv_mixer, "_walk_backward_kernel", lambda T: convolution(T, states=False)),
    (conv_mixer, "_walk_backward_kernel", lambda T: convolution(T, states=True)),
    (conv_any, "_tiles_backward_kernel", lambda T: convolution(T, states=False, channel_major=True)),
    (conv_any, "_states_backward_kernel", initial_states),
    (norm, "_rms_norm_backward_kernel", lambda T: added_norm(T, 4096, True)),
    (norm, "_rms_norm_backward_kernel", lambda T: added_norm(T, 8192, True)),
    (norm, "_rms_norm_backward_kernel", lambda T: added_norm(T, 4096, False)),
    (split, "_split_backward_kernel", lambda T: split_parts(T, True)),
    (split, "_split_backward_kernel", lambda T: split_parts(T, False)),
    (softplus, "_softplus_backward_kernel", lambda T: time_steps(T, torch.bfloat16)),
    (softplus, "_softplus_backward_kernel", lambda T: time_steps(T, torch.float32)),
]


@pytest.fixture
def no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_sums, "_sum_kernel", Launches())


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(("module", "name", "call"), CASES)
def test_nothing_is_spilled_and_a_length_compiles_nothing(
    module: Any,
    name: str,
    call: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_sums: None,
) -> None:
    kernel, launches = getattr(module, name), Launches()
    monkeypatch.setattr(module, name, launches)
    if "tiles" in name:  # the stride between channels of a channel-major tensor is its length
        call(2048)
    else:
        for T in (2048, 1003):
            call(T)
        assert len({specialization(kernel, launch) for launch in launches.calls}) == 1
    assert stack_bytes(compile_as_launched(kernel, launches.calls[0]), tmp_path) == 0


def test_sums_of_any_number_of_programs_are_one_kernel() -> None:
    kernel, launches = partial_sums._sum_kernel, Launches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_sums, "_sum_kernel", launches)
        for P, C in ((1, 16), (33, 1024), (256, 4095)):
            partial_sums.sum_partials(torch.empty(C), torch.empty(P, C))
            partial_sums.sum_partials(torch.empty(C, 4).t(), torch.empty(P, 5, C)[:, :-1])
    assert len({specialization(kernel, launch) for launch in launches.calls}) == 1


@pytest.mark.gpu
def test_the_same_bits_in_every_run() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").to(dtype).requires_grad_()

    T, D, R, N, H = 3000, 1536, 96, 16, 768
    starts = torch.tensor([0, 700, 701, 3000], dtype=torch.int32, device="cuda")
    x, weight, bias, states = randn(D, T), randn(D, 4), randn(D), randn(3, D, 3)
    token_major = randn(T, D)
    stream = randn(T, H, dtype=torch.float32)
    calls: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = [
        (
            lambda x, w, b, s: causal_conv1d_fn(
                x.t(), w, b, initial_states=s, activation="silu", query_start_loc=starts
            ),
            (token_major, weight, bias, states),
        ),
        (
            lambda x, w, b: causal_conv1d_fn(x, w, b, activation="silu", query_start_loc=starts),
            (x, weight, bias),
        ),
        (add_rms_norm, (randn(T, H), stream, randn(H))),
        (
            lambda x, d, b, c: split_dt_bc(x, R, N, dt_weight=d, b_weight=b, c_weight=c, eps=1e-5),
            (randn(T, R + 2 * N), randn(R), randn(N), randn(N)),
        ),
        (linear_softplus, (randn(T, R), randn(D, R), randn(D, dtype=torch.float32))),
    ]
    for call, inputs in calls:
        runs = []
        for _ in range(3):
            outs = call(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            runs.append(torch.autograd.grad(outs, inputs, [cotangent(o, i) for i, o in enumerate(outs)]))
        for again in runs[1:]:
            assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))
