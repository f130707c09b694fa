"""softplus(x @ weight.T + bias): the Triton kernels (interpreted, and on a GPU) and the CPU path against float64."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_testing import (
    DEVICES,
    TIME_STEPS,
    Launches,
    assert_within_twice,
    compile_as_launched,
    double,
    sass_of,
    specialization,
    stack_bytes,
    to,
    triton_device,
)
from poisoning import poisoned_memory

from tp_mamba.kernels.common.device import INTERPRETED
from tp_mamba.kernels.linear_softplus import launch, linear_softplus
from tp_mamba.kernels.linear_softplus.reference import linear_softplus_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    (1, 300, 48),
    (5, 33, 3),
    (17, 33, 70),
    (64, 130, 80),
    (65, 200, 48),
    (200, 300, 17),
    (130, 70, 256),
    (300, 128, 16),
    (150, 40, 300),  # ranks in blocks
]
"""T, D, R."""
STREAMED = [
    (65, 200, 48),  # two tiles, most of the second shared with the first
    (200, 300, 17),  # a program takes several tiles
    (130, 70, 256),
    (300, 128, 16),  # a single block of channels, without a mask
]
"""Sizes that are also computed as of more outputs: with the weight held."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


@pytest.fixture(params=[*DEVICES, "cpu"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Both implementations: Triton as in ``device``, and plain torch."""
    return torch.device("cpu") if request.param == "cpu" else triton_device(request.param, monkeypatch)


def kernels() -> Any:
    """The kernels' module as it is now: ``triton_device`` imports another one to be interpreted."""
    return importlib.import_module("tp_mamba.kernels.linear_softplus.any")


def plan_otherwise(monkeypatch: pytest.MonkeyPatch, few_outputs: int) -> None:
    """Plans as for a GPU of one SM, on which so many outputs are few."""
    monkeypatch.setattr(launch, "FEW_OUTPUTS", few_outputs)
    monkeypatch.setattr(kernels(), "launch_plan", launch.launch_plan.__wrapped__)  # without its memory
    monkeypatch.setattr(kernels(), "device_properties", lambda device: replace(INTERPRETED, sm_count=1))


@pytest.fixture
def streaming(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As ``device``, but with the weight held from 65 tokens on, however few the outputs, by at most two programs."""
    plan_otherwise(monkeypatch, few_outputs=0)
    monkeypatch.setattr(kernels(), "_tiled_kernel", None)
    return device


def make(T: int, D: int, R: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Normalised inputs and mamba_ssm's initial weights: time steps from 1e-3 up, and a few times 1."""
    g = torch.Generator().manual_seed(seed + T + D + R)
    return {
        "x": torch.randn(T, R, generator=g).to(dtype),
        "weight": ((torch.rand(D, R, generator=g) * 2 - 1) * R**-0.5).to(dtype),
        "bias": torch.rand(D, generator=g) * 8 - 7,
    }


def check(inputs: dict[str, Any], device: torch.device) -> torch.Tensor:
    """One call within twice the reference's error; every element of what the op allocates is written."""
    with poisoned_memory():
        actual = linear_softplus(**to(inputs, device))
    assert actual.dtype == inputs["x"].dtype
    assert actual.is_contiguous()
    assert_within_twice(
        actual,
        linear_softplus_reference(**inputs),
        linear_softplus_reference(**double(inputs)),
        approximate=0.25,
    )
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "R"), SIZES)
def test_matches_float64(any_device: torch.device, T: int, D: int, R: int, dtype: torch.dtype) -> None:
    check(make(T, D, R, dtype), any_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "D", "R"), STREAMED)
def test_streaming_matches_float64(
    streaming: torch.device, T: int, D: int, R: int, dtype: torch.dtype
) -> None:
    check(make(T, D, R, dtype), streaming)


@pytest.mark.parametrize("T", [8, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", TIME_STEPS)
def test_softplus_at_every_size(any_device: torch.device, step: float, dtype: torch.dtype, T: int) -> None:
    inputs = make(T, 40, 24, dtype)
    inputs["bias"] = step + 0.2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    inputs["weight"] *= 0.2
    check(inputs, any_device)


def check_any_bias(T: int, device: torch.device) -> None:
    inputs = make(T, 50, 20, torch.bfloat16)
    for bias in (
        None,
        inputs["bias"].half(),
        inputs["bias"].double(),
        inputs["bias"].repeat_interleave(2)[::2],
    ):
        check(inputs | {"bias": bias}, device)


@pytest.mark.parametrize("T", [9, 90])
def test_bias_of_any_dtype_or_none(any_device: torch.device, T: int) -> None:
    check_any_bias(T, any_device)


def test_streaming_with_a_bias_of_any_dtype_or_none(
    streaming: torch.device,
) -> None:
    check_any_bias(90, streaming)


def check_any_strides(T: int, device: torch.device) -> None:
    """x as columns of a wider tensor or transposed; weight transposed or with gaps."""
    plain = make(T, 50, 20, torch.bfloat16)
    wide, tall = torch.zeros(T, 31, dtype=torch.bfloat16), torch.zeros(100, 40, dtype=torch.bfloat16)
    wide[:, 3:23], tall[::2, ::2] = plain["x"], plain["weight"]
    expected = check(plain, device)
    for change in (
        {"x": wide[:, 3:23]},
        {"x": plain["x"].t().contiguous().t()},
        {"weight": plain["weight"].t().contiguous().t()},
        {"weight": tall[::2, ::2]},
    ):
        actual = check(plain | change, device)
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("T", [1, 9, 90])
def test_any_strides(any_device: torch.device, T: int) -> None:
    check_any_strides(T, any_device)


def test_streaming_of_any_strides(streaming: torch.device) -> None:
    check_any_strides(90, streaming)


@pytest.mark.parametrize(("R", "biased"), [(40, True), (300, False)])
def test_row_does_not_depend_on_its_batch(
    device: torch.device, R: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a class of calls and across the borders at 16 tokens and of few outputs, wherever in a tile a row lies."""
    D = 130
    matmul = np.matmul
    # In the interpreter a tile's product is numpy's, whose order of a sum may depend on the tile: not so in float64.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: matmul(a, b, dtype=np.float64).astype(dtype))
    plan_otherwise(monkeypatch, few_outputs=128 * D)  # then 129 tokens are many
    inputs = to(make(300, D, R, torch.bfloat16), device)
    bias = inputs["bias"] if biased else None

    def rows(start: int, stop: int) -> torch.Tensor:
        # Of float32: rounded to the dtype of x, most differences would be lost.
        out = torch.full((stop - start, D), float("nan"), device=device)
        kernels().launch(out, inputs["x"][start:stop], inputs["weight"], bias)
        return out

    whole = rows(0, 300)
    for start, stop in ((0, 65), (37, 137), (170, 298), (171, 300)):
        assert torch.equal(rows(start, stop), whole[start:stop]), (start, stop)
    few = rows(100, 164)
    for start, stop in ((100, 101), (117, 133), (148, 164), (147, 164), (101, 164)):
        assert torch.equal(rows(start, stop), few[start - 100 : stop - 100]), (start, stop)


def test_classes_of_calls() -> None:
    """The borders: 16 and 64 tokens, 2^21 outputs. Nothing but ``tiles`` depends on T within a class."""

    def shape(T: int, dtype: torch.dtype = torch.bfloat16, R: int = 256) -> Any:
        return replace(launch.launch_plan(T, 4096, R, dtype, INTERPRETED), tiles=0)

    for classes, options in (
        ([range(1, 17), range(17, 65), range(65, 513), range(513, 3000)], {}),
        (
            [range(1, 17), range(17, 65), range(65, 3000)],
            {"R": 257},
        ),  # the weight's rows would fill the memory
        ([range(1, 65), range(65, 3000)], {"dtype": torch.float32}),
    ):
        shapes = [{shape(T, **options) for T in each} for each in classes]
        assert [len(each) for each in shapes] == [1] * len(classes)
        assert len(set.union(*shapes)) == len(classes)
        assert [each.pop().streaming for each in shapes] == [each[0] == 513 for each in classes]


def test_nothing_to_do(any_device: torch.device) -> None:
    x, weight = torch.randn(3, 4, device=any_device), torch.randn(5, 4, device=any_device)
    assert linear_softplus(x[:0], weight).shape == (0, 5)
    assert linear_softplus(x, weight[:0]).shape == (3, 0)


def test_float64() -> None:
    inputs = double(make(7, 9, 20))
    actual = linear_softplus(**inputs)
    torch.testing.assert_close(actual, linear_softplus_reference(**inputs), rtol=1e-13, atol=0)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    T, D, R = 262_144, 8_320, 16
    inputs = to(make(T, D, R, torch.bfloat16), torch.device("cuda"))
    whole = linear_softplus(**inputs)
    last = linear_softplus(inputs["x"][-100:], inputs["weight"], inputs["bias"])
    assert torch.equal(whole[-100:], last)


def test_compiled_and_opcheck() -> None:
    inputs = make(3, 6, 4)
    for bias in (inputs["bias"], None):
        arguments = (inputs["x"], inputs["weight"], bias)
        torch.library.opcheck(torch.ops.tp_mamba.linear_softplus.default, arguments)
        compiled = torch.compile(linear_softplus, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), linear_softplus(*arguments))


def record(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any]) -> tuple[str, Any, Any]:
    """Name and kernel of the launch that the Triton path would make for a call, and that launch."""
    import tp_mamba.kernels.linear_softplus as op
    import tp_mamba.kernels.linear_softplus.any as module

    names = ("_streaming_kernel", "_tiled_kernel")
    launches = {name: Launches() for name in names}
    kernels = {name: getattr(module, name) for name in names}
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(module, name, launches[name])
        patch.setattr(op, "use_triton", lambda x: True)
        linear_softplus(**inputs)
    (name,) = (name for name in names if launches[name].calls)
    (launch,) = launches[name].calls
    return name, kernels[name], launch


def test_four_compilations_for_all_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens have two, few outputs one, many outputs one."""
    every = set()
    x, weight = torch.zeros(5000, 48, dtype=torch.bfloat16), torch.zeros(4096, 48, dtype=torch.bfloat16)
    for counts in ((1, 2, 16), (17, 33, 64), (65, 80, 512), (513, 1024, 5000)):
        keys = set()
        for T in counts:
            name, *recorded = record(monkeypatch, {"x": x[:T], "weight": weight})
            keys.add(name + specialization(*recorded))
        assert len(keys) == 1
        assert (name == "_streaming_kernel") == (T == 5000)
        every |= keys
    assert len(every) == 4
    row = make(1, 144, 48, torch.bfloat16)
    strided = row | {"x": torch.zeros(48, 1, dtype=torch.bfloat16).t()}  # a single row of some other stride
    assert specialization(*record(monkeypatch, row)[1:]) == specialization(*record(monkeypatch, strided)[1:])


@pytest.mark.parametrize(
    ("T", "D"), [(8192, 8192), (8192, 4096), (2048, 5120), (512, 8192), (262_144, 16_384)]
)
def test_programs_fill_the_gpu_once(T: int, D: int) -> None:
    """With the weight held, programs are at most two per multiprocessor, and no more than a tenth too few."""
    shape = launch.launch_plan(T, D, 256, torch.bfloat16, INTERPRETED)
    assert shape.streaming
    runs = -(-T // (shape.BLOCK_T * shape.tiles))
    programs = runs * -(-D // shape.BLOCK_D)
    assert programs <= 264
    assert programs >= 0.9 * 264 or shape.tiles == 1


COMPILED = [
    (8193, 256, 256, torch.bfloat16),
    (8193, 256, 160, torch.float16),
    (80, 256, 256, torch.bfloat16),
    (40, 256, 160, torch.bfloat16),
    (80, 256, 512, torch.bfloat16),
    (80, 256, 256, torch.float32),
    (65, 4096, 256, torch.bfloat16),
    (64, 4096, 256, torch.bfloat16),
    (17, 4096, 256, torch.bfloat16),
    (16, 4096, 256, torch.bfloat16),
    (8, 256, 256, torch.bfloat16),
    (8, 256, 256, torch.float32),
]
"""T, D, R, dtype of every class of calls."""


@pytest.mark.parametrize(("T", "D", "R", "dtype"), COMPILED)
def test_one_instruction_for_each_class_of_calls(
    monkeypatch: pytest.MonkeyPatch, T: int, D: int, R: int, dtype: torch.dtype
) -> None:
    """One up to 64 tokens, one above: a row's bits are the same where the tile is another."""
    _, *recorded = record(monkeypatch, make(T, D, R, dtype))
    compiled = compile_as_launched(*recorded)
    products = re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+\S+", compiled.asm["ptx"])
    kinds = {re.sub(r"(m64)n\d+", r"\1", product) for product in products}
    if dtype == torch.float32:
        assert not products
        assert "tf32" not in compiled.asm["ptx"]
    else:
        of = "bf16" if dtype == torch.bfloat16 else "f16"
        name = f"wgmma.mma_async.sync.aligned.m64k16.f32.{of}.{of}"
        assert kinds == {f"mma.sync.aligned.m16n8k16.row.col.f32.{of}.{of}.f32" if T <= 64 else name}


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(("T", "D", "R", "dtype"), COMPILED)
def test_compiles_for_hopper_without_spills(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, T: int, D: int, R: int, dtype: torch.dtype
) -> None:
    _, *recorded = record(monkeypatch, make(T, D, R, dtype))
    assert stack_bytes(compile_as_launched(*recorded), tmp_path) == 0


@pytest.mark.pinned_toolchain
def test_two_programs_share_a_hopper_multiprocessor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The softplus of one then hides behind the product of the other; and few instructions go beside the softplus."""
    name, *recorded = record(monkeypatch, make(8193, 256, 256, torch.bfloat16))
    assert name == "_streaming_kernel"
    compiled = compile_as_launched(*recorded)
    reserved, of_multiprocessor = 1024, 228 * 1024
    assert 2 * (compiled.metadata.shared + reserved) <= of_multiprocessor
    instructions = [op for op in sass_of(compiled, tmp_path) if op != "NOP"]
    outputs_a_thread = 64 * 128 // 128
    assert 17 * outputs_a_thread < len(instructions) < 30 * outputs_a_thread


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "x has shape [4] but must be [T, R]"),
        (
            {"x": torch.zeros(3, 0), "weight": torch.zeros(6, 0)},
            "x has shape [3, 0] but must be [T, R] with at least",
        ),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"weight": torch.zeros(6, 5)}, "weight has shape [6, 5] but must be [D, R] with R = 4"),
        ({"weight": torch.zeros(4)}, "weight has shape [4] but must be [D, R]"),
        ({"weight": torch.zeros(6, 4).bfloat16()}, "weight has dtype torch.bfloat16 but x has torch.float32"),
        ({"weight": torch.zeros(6, 4, device="meta")}, "weight is on meta but x is on cpu"),
        ({"bias": torch.zeros(5)}, "bias has shape [5] but [D] is [6]"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, "bias has dtype torch.int64"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    inputs = make(3, 6, 4) | change
    with pytest.raises(ValueError, match=r"^linear_softplus: ") as refusal:
        linear_softplus(**inputs)
    assert message in str(refusal.value)
