"""What a convolution of whole sequences launches on a GPU: compilations, programs, machine code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_conv1d_testing import starts_of, token_major, weights
from conv_norm_testing import CUDA, run_on
from kernel_testing import Launches, compile_as_launched, registers, specialization, stack_bytes

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn

BATCHES = ((1,), (5, 8), (16,), (1, 1, 1), (17, 64, 0, 100), (3,) * 16, (40_000,))
"""Whose packed batches run the same compiled kernel. (Channel-major, the first is a row like any other.)"""


def check_new_lengths_do_not_recompile(device: str) -> None:
    from tp_mamba.kernels.causal_conv1d.any import _causal_conv1d_kernel

    D, K = 32, 4
    weight, bias = weights(D, K, True, torch.bfloat16, device)
    states = torch.zeros(20, D, K - 1, dtype=torch.bfloat16, device=device)

    def variants() -> int:
        return sum(len(cache[0]) for cache in _causal_conv1d_kernel.device_caches.values())

    def call(lengths: tuple[int, ...], channel_major: bool) -> None:
        x = token_major(sum(lengths), D, torch.bfloat16, device)
        # Slices, as of the prefill part of a mixed batch: their alignment varies.
        slots = torch.arange(20, dtype=torch.int32, device=device)[len(lengths) % 4 :][: len(lengths)]
        causal_conv1d_fn(
            x.contiguous() if channel_major else x, weight, bias, activation="silu",
            query_start_loc=starts_of(lengths, device), cache_indices=slots, conv_states=states,
        )  # fmt: skip

    for channel_major in (False, True):
        call((5, 8), channel_major)
        before = variants()
        for lengths in BATCHES[channel_major:]:
            call(lengths, channel_major)
        assert variants() == before > 0


@pytest.mark.parametrize("where", [CUDA])
def test_new_lengths_do_not_recompile(where: str) -> None:
    run_on(where, check_new_lengths_do_not_recompile)


def record(
    monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, lengths: tuple[int, ...], *, dense: bool = False
) -> tuple[Any, Any]:
    """What a packed batch ``x [D, T]``, or a dense one of one sequence, launches on a GPU: kernel, arguments."""
    from tp_mamba.kernels.causal_conv1d import any as module

    kernel, launches = module._causal_conv1d_kernel, Launches()
    weight, bias = weights(x.shape[0], 4, True, x.dtype, "cpu")
    states = torch.zeros(20, 3, x.shape[0], dtype=x.dtype).mT
    slots = torch.arange(20, dtype=torch.int32)[len(lengths) % 4 :][: len(lengths)]
    packed = {"query_start_loc": starts_of(lengths, "cpu"), "cache_indices": slots, "conv_states": states}
    with monkeypatch.context() as patch:
        patch.setattr(module, "_causal_conv1d_kernel", launches)
        patch.setattr("tp_mamba.kernels.causal_conv1d.operator.use_triton", lambda x: True)
        if dense:
            causal_conv1d_fn(x[None], weight, bias, activation="silu")
        else:
            causal_conv1d_fn(x, weight, bias, activation="silu", **packed)
    (call,) = launches.calls
    return kernel, call


def test_no_length_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for channel_major in (False, True):
        keys = set()
        for lengths in BATCHES[channel_major:]:
            x = token_major(sum(lengths), 64, torch.bfloat16, "cpu")
            keys.add(specialization(*record(monkeypatch, x.contiguous() if channel_major else x, lengths)))
        assert len(keys) == 1


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(("channels", "dense"), [(8192, False), (4096, True), (16 * 513, False)])
def test_prompts_compile_for_sm90_vectorised_without_spills(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, channels: int, dense: bool
) -> None:
    x = torch.empty(16, 2 * channels, dtype=torch.bfloat16)[:, :channels].t()
    compiled = compile_as_launched(*record(monkeypatch, x, (16,), dense=dense))
    assert stack_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared == 0
    ptx = compiled.asm["ptx"]
    assert not re.search(r"(ld|st)\.shared|shfl", ptx)
    # Four channels per thread, their weights in two loads, for heads and for bodies; four programs per multiprocessor.
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v2.b32"}
    assert ptx.count("ld.global.v2.b64") == 2 * 2
    assert not re.search(r"ld\.global\.b16", ptx)
    assert registers(compiled, tmp_path) <= 128


def test_run_length() -> None:
    """One wave or a few of long runs, short ones from where many programs wait beside each other."""
    from tp_mamba.kernels.causal_conv1d.launch import tokens_per_run

    assert [tokens_per_run(tokens, 16, 8, True) for tokens in (1, 2048, 4096, 4097, 8192, 2**31)] == [
        32, 32, 32, 16, 16, 16,
    ]  # fmt: skip
    assert tokens_per_run(8192, 8, 8, True) == 32
    assert tokens_per_run(8192, 256, 64, False) == 64
