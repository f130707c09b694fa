"""What a mixer does to memory: no operator but its own steps, no copy of a [T, D] tensor, none read once too often.

Without a GPU: on the way that a GPU takes, with the kernels interpreted, and on the CPU's own. On a GPU the profiler
counts the kernels of a layer.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conv_norm_testing import run_on
from kernel_testing import TRITON_MODULES, assert_within_twice
from traffic import Recorder, Step, recorded, recorded_as_on_a_gpu

from tp_mamba.batch import MambaMetadata, MambaMetadataBuilder
from tp_mamba.kernels.common.device import INTERPRETED
from tp_mamba.kernels.linear import prefers_skinny, prefers_slices
from tp_mamba.kernels.linear.launch import launch_plan, slice_count, sums_per_product
from tp_mamba.layers.init import skip_init
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.mixer import MambaMixer, MambaState


class Sizes(NamedTuple):
    H: int
    D: int
    R: int
    N: int = 16


SMALL = Sizes(H=40, D=96, R=6)
DECODE = Sizes(H=48, D=2048, R=8)
"""D of which x_proj has a kernel of ours for few tokens."""
FALCON = Sizes(H=4096, D=8192, R=256)


class Batch(NamedTuple):
    """Decode rows and the lengths of the prefills; dense: the prefills as ``[B, L, H]``, without metadata."""

    decodes: int = 0
    lengths: tuple[int, ...] = ()
    dense: bool = False

    @property
    def tokens(self) -> int:
        return self.decodes + sum(self.lengths)


BATCHES = {
    "prefill": (SMALL, Batch(lengths=(38,))),
    "several prefills": (SMALL, Batch(lengths=(3, 21, 1, 13))),
    "decode": (DECODE, Batch(decodes=5)),
    "decode, rank of odd size": (DECODE._replace(R=6), Batch(decodes=5)),
    "decode and prefill": (SMALL, Batch(decodes=4, lengths=(17, 18))),
    "dense": (SMALL, Batch(lengths=(19, 19), dense=True)),
}


def make_mixer(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> MambaMixer:
    """A mixer with everything that a model may ask of it: norms with weights, a bias of the convolution."""
    H, D, R, N = sizes
    torch.manual_seed(0)
    mixer = MambaMixer(H, N, 4, D, R, True, False, True, dtype=dtype, device=device)
    # Rounded once, so that the same mixer in another dtype has the same weights.
    for parameter in mixer.parameters():
        parameter.copy_(parameter.bfloat16())
    return mixer


def make_call(
    mixer: MambaMixer, sizes: Sizes, batch: Batch, device: torch.device
) -> tuple[Callable[[], torch.Tensor], MambaState]:
    """One forward of ``batch``, every sequence in a slot of its own, and the states it updates."""
    g = torch.Generator().manual_seed(1)
    rows = batch.decodes + len(batch.lengths)
    h_TH = torch.randn(batch.tokens, sizes.H, generator=g).bfloat16().to(device, mixer.dtype)
    conv, ssm = (
        torch.randn(rows, width, channels, generator=g).bfloat16().to(device, dtype).mT
        for (channels, width), dtype in zip(mixer.get_state_shape(), mixer.get_state_dtype(), strict=True)
    )
    state = MambaState(conv, ssm)
    if batch.dense:
        h_BLH = h_TH.view(len(batch.lengths), -1, sizes.H)
        return lambda: mixer(h_BLH), state
    metadata: MambaMetadata = MambaMetadataBuilder(device).build(
        decode_slots=range(batch.decodes),
        prefill_slots=range(batch.decodes, rows),
        prefill_lengths=batch.lengths,
        has_initial_states=[True] * len(batch.lengths),
    )
    return lambda: mixer(h_TH, metadata, state), state


def expected_steps(sizes: Sizes, batch: Batch, dtype: torch.dtype, *, triton: bool) -> list[Step]:
    """What one forward has to do, and no more.

    Of [T, D]: in_proj writes 2, the convolution reads 1 and writes 1, x_proj reads 1, dt_proj writes 1, the scan (or
    the update) reads u, delta and z and writes y, out_proj reads 1. Where one kernel does dt_proj and the update, delta
    is neither written nor read.
    """
    T, (H, D, R, N) = batch.tokens, sizes
    item = dtype.itemsize
    columns = R + 2 * N
    launch = 1 if triton else 0
    decodes, prefill_tokens = batch.decodes, T - batch.decodes
    slices = x_proj_slices(sizes, batch, dtype) if triton else 0

    def product(N: int, K: int, wide: int, narrow: int, out_item: int) -> Step:
        """A product by the library, or by the kernel for few rows where that is preferred."""
        if not (triton and prefers_skinny(T, N, K, dtype)):
            return Step("aten::mm", 0, wide, narrow)
        groups = -(-slice_count(N, K) // launch_plan(T, N, K, INTERPRETED).group)
        if groups == 1:
            return Step("tp_mamba::skinny_linear", 1, wide, narrow)
        return Step("tp_mamba::skinny_linear", 2, wide, narrow + T * N * 2 * groups * 4)

    steps = [Step("aten::arange", 0, 0, 0)] if batch.dense else []  # the metadata's integers
    steps += [product(2 * D, H, 2 * T * D * item, T * H * item, item)]
    for name, count in (("causal_conv1d_update", decodes), ("causal_conv1d", prefill_tokens)):
        steps += [Step(f"tp_mamba::{name}", launch, 2 * count * D * item, 0)] if count else []
    if slices:
        steps += [Step("tp_mamba::skinny_linear_slices", 1, T * D * item, slices * T * columns * 4)]
    else:
        steps += [product(columns, D, T * D * item, T * columns * 4, 4)]
    split_bytes = T * (max(1, slices) * columns * 4 + R * item + 2 * N * 4)
    steps += [Step("tp_mamba::split_dt_bc", launch, 0, split_bytes)]

    def softplus(count: int) -> Step:
        return Step("tp_mamba::linear_softplus", launch, count * D * item, count * R * item)

    def recurrence(name: str, count: int) -> Step:
        return Step(f"tp_mamba::{name}", launch, 4 * count * D * item, 2 * count * N * 4)

    if decodes and (not triton or has_update_in_one(sizes)):
        narrow = decodes * (R * item + 2 * N * 4)
        steps += [Step("tp_mamba::dt_proj_state_update", launch, 3 * decodes * D * item, narrow)]
    elif decodes:
        steps += [softplus(decodes), recurrence("selective_state_update", decodes)]
    if prefill_tokens:
        steps += [softplus(prefill_tokens), recurrence("selective_scan", prefill_tokens)]
    return [*steps, product(H, D, T * D * item, T * H * item, item)]


def x_proj_slices(sizes: Sizes, batch: Batch, dtype: torch.dtype) -> int:
    """How many sums over a part of K x_proj gives on a GPU, where the next kernel adds them up; else 0."""
    shape = sizes.R + 2 * sizes.N, sizes.D
    groups = sums_per_product(*shape)
    return groups if prefers_slices(batch.tokens, *shape, dtype) else 0


def has_update_in_one(sizes: Sizes) -> bool:
    """Whether a GPU's decode rows in bfloat16 take the kernel that does dt_proj and the state update."""
    return sizes.R % 8 == 0


def assert_least_traffic(
    recorder: Recorder, expected: list[Step], mixer: MambaMixer, state: MambaState, batch: Batch
) -> None:
    assert recorder.steps == expected, "\n".join(["what ran:", *map(str, recorder.steps)])
    channels = mixer.intermediate_size
    fused = any(step.operator == "tp_mamba::dt_proj_state_update" for step in expected)
    passes = 11 * batch.tokens - (2 * batch.decodes if fused else 0)
    assert sum(step.wide for step in expected) == passes * channels * mixer.dtype.itemsize
    if not (batch.decodes and batch.lengths):  # one kernel each for the convolution and the recurrence
        held = [*mixer.parameters(), *(() if batch.dense else state)]
        assert recorder.known_bytes == sum(x.numel() * x.element_size() for x in held)


@torch.no_grad()
def check_way_of_a_gpu(device: str, name: str) -> None:
    sizes, batch = BATCHES[name]
    mixer = make_mixer(sizes, torch.bfloat16, torch.device(device))
    call, state = make_call(mixer, sizes, batch, torch.device(device))
    with recorded_as_on_a_gpu(sizes.D, [*mixer.parameters(), *state]) as recorder:
        actual = call()
    assert_least_traffic(
        recorder, expected_steps(sizes, batch, torch.bfloat16, triton=True), mixer, state, batch
    )

    # What stood in for a GPU has computed what the mixer does.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        in_dtype, exact = (
            make_call(make_mixer(sizes, dtype, torch.device(device)), sizes, batch, torch.device(device))[0]()
            for dtype in (torch.bfloat16, torch.float64)
        )
    assert_within_twice(actual, in_dtype, exact)


@pytest.mark.parametrize("name", BATCHES)
def test_no_copy_on_the_way_of_a_gpu(name: str) -> None:
    run_on("interpreter", check_way_of_a_gpu, name)


@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_no_copy_between_the_operators_on_a_cpu(name: str) -> None:
    sizes, batch = SMALL, BATCHES[name][1]
    mixer = make_mixer(sizes, torch.float32, torch.device("cpu"))
    call, state = make_call(mixer, sizes, batch, torch.device("cpu"))
    with recorded(sizes.D, [*mixer.parameters(), *state]) as recorder:
        call()
    assert_least_traffic(
        recorder, expected_steps(sizes, batch, torch.float32, triton=False), mixer, state, batch
    )


def kernels_of(call: Callable[[], object]) -> Counter[str]:
    """What one call runs on the GPU, copies and fills included, by name."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # compiled, workspaces allocated
        call()
    for _ in range(2):  # the first profile of a process also starts the tracing
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
    return Counter(event.name for event in profiled.events() if event.device_type == DeviceType.CUDA)


def triton_kernels() -> set[str]:
    """The names of all kernels of the package."""
    from triton.runtime.jit import JITFunction

    modules = [importlib.import_module(name) for name in TRITON_MODULES]
    return {x.__name__ for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch",
    [
        Batch(lengths=(2048,)),
        Batch(lengths=(100, 1, 923)),
        *(Batch(decodes=decodes) for decodes in (1, 8, 32, 64, 256)),
        Batch(decodes=8, lengths=(500, 500)),
    ],
    ids=str,
)
@torch.no_grad()
def test_kernels_of_a_layer(batch: Batch) -> None:
    """Residual add with norm, and the mixer: one launch a step, beside what the library needs for its products."""
    device, dtype, (H, D, R, N) = torch.device("cuda"), torch.bfloat16, FALCON
    with skip_init():
        mixer = make_mixer(FALCON, dtype, device)
        norm = RMSNorm(H, dtype=dtype, device=device).requires_grad_(False)
    call, _ = make_call(mixer, FALCON, batch, device)
    T = batch.tokens
    x_TH, residual_TH = (torch.zeros(T, H, dtype=kind, device=device) for kind in (dtype, torch.float32))
    y_TD = torch.zeros(T, D, dtype=dtype, device=device)

    def layer() -> None:
        norm.add(x_TH, residual_TH)
        call()

    def products() -> None:
        if not prefers_skinny(T, 2 * D, H, dtype):
            F.linear(x_TH, mixer.in_proj.weight)
        if not prefers_skinny(T, R + 2 * N, D, dtype):
            torch.mm(y_TD, mixer.x_proj.weight.t(), out_dtype=torch.float32)
        if not prefers_skinny(T, H, D, dtype):
            F.linear(y_TD, mixer.out_proj.weight)

    found, of_the_library = kernels_of(layer), kernels_of(products)
    assert not of_the_library - found
    own = found - of_the_library
    assert set(own) <= triton_kernels()  # no copy, no fill, no kernel of torch's
    steps = expected_steps(FALCON, batch, dtype, triton=True)
    assert own.total() == 1 + sum(step.launches for step in steps)
