"""dt_proj, softplus and the state update in one: the bits of the two calls that it stands for, and against float64."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import (
    DEVICES,
    Launches,
    assert_within_twice,
    compile_as_launched,
    double,
    poisoned_like,
    specialization,
    stack_bytes,
    to,
    triton_device,
)
from ptx_testing import read_ahead, undeclared

from tp_mamba.kernels.common.device import INTERPRETED, device_properties
from tp_mamba.kernels.dt_proj_state_update import dt_proj_state_update, launch
from tp_mamba.kernels.dt_proj_state_update.reference import dt_proj_state_update_reference
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.selective_state_update import selective_state_update

PAD = 0


def make(
    batch: int, channels: int, n: int, rank: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Any]:
    """A mixer's decode rows: z beside x in one tensor, B beside C, states with contiguous channels, one row padded."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * std).to(dtype)

    xz = normal(batch, 2 * channels)
    bc = normal(batch, 2 * n, dtype=torch.float32)
    slots = torch.randperm(batch + 2, generator=g)[:batch].to(torch.int32) + 1
    slots[batch // 2] = PAD
    return {
        "state": normal(batch + 3, n, channels, dtype=torch.float32).mT,
        "x": xz[:, :channels],
        "dt": normal(batch, rank),
        "weight": normal(channels, rank, std=rank**-0.5),
        "bias": normal(channels, std=2.0, dtype=torch.float32),
        "A": -torch.exp(normal(n, channels, dtype=torch.float32)).t(),
        "B": bc[:, :n],
        "C": bc[:, n:],
        "D": normal(channels, dtype=torch.float32),
        "z": xz[:, channels:],
        "state_batch_indices": slots,
    }


def separately(inputs: dict[str, Any]) -> torch.Tensor:
    rest = {name: x for name, x in inputs.items() if name not in ("dt", "weight", "bias")}
    delta = linear_softplus(inputs["dt"], inputs["weight"], inputs["bias"])
    return selective_state_update(**rest, dt=delta, pad_slot_id=PAD)


CASES = {
    "16 rows": make(16, 64, 16, 256),
    "more rows": make(37, 32, 16, 40, seed=1),
    "one row": make(1, 96, 8, 256, seed=2) | {"state_batch_indices": None},
    "N 4, float16": make(5, 64, 4, 24, torch.float16, seed=3),
    "no bias, D, z": make(3, 32, 16, 64, seed=4) | {"bias": None, "D": None, "z": None},
    "16-bit states": make(9, 32, 16, 96, seed=5),
}
CASES["16-bit states"]["state"] = CASES["16-bit states"]["state"].mT.bfloat16().contiguous().mT


def fused_module() -> Any:
    """The kernel's module as the op has it now: ``triton_device`` imports another one for the interpreter."""
    return importlib.import_module("tp_mamba.kernels.dt_proj_state_update.mixer")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


def run(call: Any, inputs: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and state after a call; ``inputs`` stay as they are."""
    inputs = to(inputs | {"state": inputs["state"].mT.clone().mT}, device)
    return call(inputs), inputs["state"]


def in_one(inputs: dict[str, Any]) -> torch.Tensor:
    out = poisoned_like(inputs["x"].contiguous())
    return dt_proj_state_update(**inputs, pad_slot_id=PAD, out=out)


def noted_launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every call that the fused kernel serves."""
    launches: list[Any] = []
    fused = fused_module()
    original = fused.launch

    def launch(*args: Any) -> bool:
        served: bool = original(*args)
        launches.extend([args] * served)
        return served

    monkeypatch.setattr(fused, "launch", launch)
    return launches


@pytest.mark.parametrize(("channels", "blocks"), [(32, 1), (64, 1), (32, 2)])
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_the_two_calls(
    case: str, channels: int, blocks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many channels and rows a program takes; padded rows among them, and slots that no row names."""
    inputs, launches = CASES[case], noted_launches(monkeypatch)
    if inputs["x"].shape[1] % channels:
        pytest.skip("the launcher takes 32 then")
    monkeypatch.setattr(
        fused_module(),
        "launch_plan",
        lambda batch, D, R, device: launch.plan_of(batch, D, R, blocks, channels),
    )
    out, state = run(in_one, inputs, device)
    assert len(launches) == 1
    expected_out, expected_state = run(separately, inputs, device)
    assert torch.equal(out, expected_out)
    assert torch.equal(state, expected_state)
    assert not torch.equal(state.cpu(), inputs["state"])


@pytest.mark.parametrize("where", [*DEVICES, "cpu"])
def test_matches_float64(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu") if where == "cpu" else triton_device(where, monkeypatch)
    inputs = make(37, 64, 16, 256, seed=7)
    results = []
    for each in (inputs, double(inputs)):
        own = each | {"state": each["state"].clone()}
        results.append((dt_proj_state_update_reference(**own, pad_slot_id=PAD), own["state"]))
    for actual, in_dtype, exact in zip(run(in_one, inputs, device), *results, strict=True):
        # The time steps are rounded between the two in either; twice the reference's own error is the bound.
        assert_within_twice(actual, in_dtype, exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "channels"), [(64, 8192), (300, 4096)])
def test_many_rows(batch: int, channels: int) -> None:
    """Two blocks of rows per program: the bits of the two calls, 64 rows at a time."""
    inputs, by_row = make(batch, channels, 16, 256), ("x", "dt", "B", "C", "z", "state_batch_indices")
    assert launch.launch_plan(batch, channels, 256, device_properties(torch.device("cuda"))).blocks == 2
    out, state = run(in_one, inputs, torch.device("cuda"))
    expected_state = inputs["state"].cuda()
    for i in range(0, batch, 64):
        some = to({name: inputs[name][i : i + 64] for name in by_row}, torch.device("cuda"))
        expected = separately(to(inputs, torch.device("cuda")) | some | {"state": expected_state})
        assert torch.equal(out[i : i + 64], expected)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("batch", [1, 5, 11])
def test_row_does_not_depend_on_its_batch(device: torch.device, batch: int) -> None:
    inputs = make(24, 32, 16, 64, seed=8)
    by_row = ("x", "dt", "B", "C", "z", "state_batch_indices")
    out, state = run(in_one, inputs, device)
    some = inputs | {name: inputs[name][3 : 3 + batch] for name in by_row}
    some_out, some_state = run(in_one, some, device)
    slots = some["state_batch_indices"]
    live = slots[slots != PAD].long()
    assert torch.equal(some_out, out[3 : 3 + batch])
    assert torch.equal(some_state[live], state[live])
    unused = [s for s in range(len(state)) if s not in live.tolist()]
    assert torch.equal(some_state[unused].cpu(), inputs["state"][unused])


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(9, 40).bfloat16(), "z": None},  # no whole blocks
        {"dt": torch.randn(9, 20).bfloat16(), "weight": torch.randn(40, 20).bfloat16()},  # no whole words
        {"dtype": torch.float32},
        {"n": 32},
        {"many": True},  # more than a grid has room for
    ],
)
def test_other_calls_run_the_two_kernels(
    device: torch.device, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = 40 if "x" in change or "dt" in change else 32
    inputs = make(9, channels, change.get("n", 16), 24, change.get("dtype", torch.bfloat16))
    inputs |= {name: x for name, x in change.items() if name in inputs}
    if "many" in change:
        monkeypatch.setattr(fused_module(), "launch_plan", lambda *sizes: None)
    launches = noted_launches(monkeypatch)
    results = zip(run(in_one, inputs, device), run(separately, inputs, device), strict=True)
    assert all(torch.equal(actual, expected) for actual, expected in results)
    assert not launches


def test_nothing_to_do(device: torch.device) -> None:
    inputs = to(make(3, 32, 16, 64), device)
    none = inputs | {name: inputs[name][:0] for name in ("x", "dt", "B", "C", "z", "state_batch_indices")}
    assert dt_proj_state_update(**none).shape == (0, 32)


def test_opcheck() -> None:
    inputs = make(3, 32, 16, 64)
    names = ("state", "x", "dt", "weight", "bias", "A", "B", "C", "D", "z", "state_batch_indices")
    arguments = (*(inputs[name] for name in names), PAD, torch.empty(3, 32, dtype=torch.bfloat16))
    torch.library.opcheck(torch.ops.tp_mamba.dt_proj_state_update.default, arguments)


def record(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], pdl: bool = True) -> tuple[Any, Any]:
    """The kernel, and the launch that a call would make on a Hopper GPU."""
    fused, launches = fused_module(), Launches()
    kernel = fused.dt_proj_state_update_kernel
    with monkeypatch.context() as patch:
        patch.setattr(fused, "dt_proj_state_update_kernel", launches)
        patch.setattr("tp_mamba.kernels.dt_proj_state_update.use_triton", lambda x: True)
        patch.setattr("tp_mamba.kernels.common.dependent_launch.has_dependent_launch", lambda device: pdl)
        dt_proj_state_update(**inputs, pad_slot_id=PAD)
    return kernel, launches.calls[0]


def test_one_compilation_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for batch in (1, 2, 7, 33):
        inputs = make(batch, 64, 16, 64)
        keys.add(specialization(*record(monkeypatch, inputs)))
        # A packed batch's first rows, states of a later layer.
        inputs |= {name: inputs[name][batch // 2 :] for name in ("x", "dt", "z", "B", "C")}
        inputs["state_batch_indices"] = inputs["state_batch_indices"][batch // 2 :]
        inputs["state"] = inputs["state"][1:]
        keys.add(specialization(*record(monkeypatch, inputs)))
    assert len(keys) == 1


@pytest.mark.pinned_toolchain
def test_plans() -> None:
    """Two blocks of rows where all programs are still resident; 64 channels where warps would have no row."""

    def blocks(batch: int, channels: int) -> int:
        return launch.launch_plan(batch, channels, 256, INTERPRETED).blocks

    def channels_per_program(batch: int, channels: int) -> int:
        return launch.launch_plan(batch, channels, 256, INTERPRETED).block_d

    assert [blocks(batch, 8192) for batch in (1, 8, 31, 32, 256)] == [1, 1, 1, 2, 2]
    assert [blocks(batch, 4096) for batch in (8, 32, 63, 64)] == [1, 1, 1, 2]
    assert blocks(8, 2**20) == 1
    assert [channels_per_program(batch, 8192) for batch in (1, 2, 3, 64)] == [64, 64, 32, 32]
    assert [channels_per_program(1, D) for D in (7680, 7648, 4096, 32)] == [64, 32, 32, 32]


def test_plans_depend_on_the_device() -> None:
    """Programs are few or many for the SMs of the tensor's own GPU."""
    small, large = replace(INTERPRETED, sm_count=60), replace(INTERPRETED, sm_count=160)
    assert [launch.launch_plan(1, 4096, 256, device).block_d for device in (small, large)] == [64, 32]
    assert [launch.launch_plan(32, 8192, 256, device).blocks for device in (small, large)] == [2, 1]


def test_more_rows_than_a_grid_has_room_for() -> None:
    assert launch.launch_plan(65535 * 16 + 1, 8192, 256, INTERPRETED) is None


TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
MACHINE_CODE = pytest.mark.parametrize(
    ("batch", "n", "rank"), [(8, 16, 256), (1, 16, 256), (33, 16, 256), (8, 8, 160), (8, 4, 48)]
)


@MACHINE_CODE
def test_instruction_of_the_product(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: int, n: int, rank: int
) -> None:
    """With every Triton the product's instruction is linear_softplus', whatever the number of rows; nothing spills.

    (From 3.9 on a tile that was loaded before the wait cannot be moved to shared memory before it, and some spill.)
    """
    compiled = compile_as_launched(*record(monkeypatch, make(batch, 8192, n, rank)))
    assert "wgmma" not in compiled.asm["ptx"]
    assert "mma.sync.aligned.m16n8k16" in compiled.asm["ptx"]
    assert not undeclared(compiled, "tp_mamba::dt_proj_state_update")
    assert stack_bytes(compiled, tmp_path) <= (0 if TRITON < (3, 9) else 128)


@pytest.mark.pinned_toolchain
@MACHINE_CODE
def test_machine_code(monkeypatch: pytest.MonkeyPatch, batch: int, n: int, rank: int) -> None:
    compiled = compile_as_launched(*record(monkeypatch, make(batch, 8192, n, rank)))
    assert read_ahead(compiled) == {"weight_ptr", "bias_ptr", "D_ptr", "state_batch_indices_ptr"}
    # Only the time steps change hands after the product.
    ptx = compiled.asm["ptx"]
    assert len(re.findall(r"bar\.sync", ptx.rpartition("mma.sync")[2])) == 2
    # States and A, two channels per load, all before the first product; then B and C.
    before, _, after = ptx.partition("mma.sync")
    assert len(re.findall(r"ld\.global\.v2\.b32", before)) >= 2 * n
    assert len(re.findall(r"st\.global\.v2\.b32", after)) == n * (2 if batch > 32 else 1)


def test_without_early_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_as_launched(*record(monkeypatch, make(8, 64, 16, 256), pdl=False))
    assert "griddepcontrol" not in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2, 16)}, "x has shape [3, 2, 16] and B [3, 4] but must be [B, D] and [B, N]"),
        ({"B": torch.zeros(3, 1, 4)}, "B [3, 1, 4] but must be"),
        ({"dt": torch.zeros(3)}, "dt has shape [3] but must be [T, R]"),
        ({"dt": torch.zeros(4, 8)}, "dt has 4 rows and weight 32"),
        ({"weight": torch.zeros(31, 8), "bias": None}, "dt has 3 rows and weight 31"),
        ({"weight": torch.zeros(32, 7)}, "weight has shape [32, 7] but must be [D, R] with R = 8, as in dt"),
        ({"weight": torch.zeros(32, 8).half()}, "weight has dtype torch.float16 but dt has torch.float32"),
        ({"bias": torch.zeros(31)}, "bias has shape [31] but [D] is [32]"),
        ({"A": torch.zeros(32, 5)}, "B has shape [3, 4] but must be [B, N]"),
        ({"z": torch.zeros(3, 31)}, "z has shape [3, 31] but [B, D] is [3, 32]"),
        ({"state": torch.zeros(9, 32, 5)}, "state has shape [9, 32, 5] but must be [slots, *A.shape]"),
        ({"state_batch_indices": torch.zeros(2).int()}, "state_batch_indices has shape [2] but [B] is [3]"),
        ({"dt": torch.zeros(3, 8, device="meta")}, "dt is on meta but x is on cpu"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    inputs = make(3, 32, 4, 8, torch.float32) | change
    with pytest.raises(ValueError, match=r"^dt_proj_state_update: ") as refusal:
        dt_proj_state_update(**inputs)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", ["x", "dt", "weight", "bias"])
def test_no_gradient_is_cut_silently(name: str) -> None:
    inputs = make(3, 32, 4, 8, torch.float32)
    inputs[name] = inputs[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"dt_proj_state_update: {name} requires grad"):
        dt_proj_state_update(**inputs)
