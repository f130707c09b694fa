"""The one-step update's kernel for a mixer's layout: its bits, where it runs, what its loop costs on a Hopper GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import (
    DEVICES,
    Launches,
    compile_as_launched,
    poisoned_like,
    registers,
    sass_of,
    specialization,
    stack_bytes,
    to,
    triton_device,
)
from ptx_testing import read_ahead, undeclared

from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.kernels.selective_state_update import selective_state_update
from tp_mamba.mixer import MambaMixer
from tp_mamba.state.cache import MambaCache

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


def module() -> Any:
    """The kernel's module as the op has it now: ``triton_device`` imports another to be interpreted."""
    return importlib.import_module("tp_mamba.kernels.selective_state_update.mixer")


def make(
    batch: int,
    channels: int,
    n: int,
    dtype: torch.dtype = BFLOAT16,
    state_dtype: torch.dtype = FLOAT32,
    bc_dtype: torch.dtype = FLOAT32,
) -> dict[str, Any]:
    """Arguments laid out as the mixer has them: rows at slots of random order among which some are unused."""
    g = torch.Generator().manual_seed(1000 * batch + channels + n)
    xz = torch.randn(batch, 2 * channels, generator=g).to(dtype)
    bc = torch.randn(batch, 2 * n, generator=g).to(bc_dtype)
    return {
        "state": torch.randn(batch + 3, n, channels, generator=g).to(state_dtype).mT,
        "x": xz[:, :channels],
        "dt": torch.randn(batch, channels, generator=g).to(dtype),
        "A": -torch.exp(torch.rand(n, channels, generator=g) * 4 - 1).t(),
        "B": bc[:, :n],
        "C": bc[:, n:],
        "D": torch.randn(channels, generator=g),
        "z": xz[:, channels:],
        "dt_bias": torch.rand(channels, generator=g) * 5 - 7,
        "dt_softplus": True,
        "state_batch_indices": torch.randperm(batch + 3, generator=g)[:batch].int(),
        "pad_slot_id": -1,
    }


def run(inputs: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and state after a call; ``inputs`` stay as they are."""
    on_device = to(inputs, device)
    if device.type == "cpu":
        on_device["state"] = on_device["state"].mT.clone().mT
    out = poisoned_like(on_device["dt"])
    return selective_state_update(**on_device, out=out), on_device["state"]


@pytest.mark.parametrize(
    ("batch", "channels", "n", "dtypes", "absent"),
    [
        (3, 256, 16, (BFLOAT16, FLOAT32), ("dt_bias", "dt_softplus")),
        (1, 132, 16, (FLOAT32, FLOAT32, BFLOAT16), ()),
        (33, 36, 4, (BFLOAT16, FLOAT32), ("z",)),
        (8, 4, 32, (FLOAT32, BFLOAT16), ("state_batch_indices",)),
        (5, 68, 32, (BFLOAT16, FLOAT32), ("dt_bias", "dt_softplus", "D", "z")),
        (3, 264, 8, (BFLOAT16, FLOAT16), ("D",)),
    ],
)
def test_bits_are_those_of_the_general_kernel(
    device: torch.device,
    batch: int,
    channels: int,
    n: int,
    dtypes: tuple[torch.dtype, ...],
    absent: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of channels whole and cut, padded rows, and slots that no row names."""
    inputs = make(batch, channels, n, *dtypes)
    inputs |= {name: False if name == "dt_softplus" else None for name in absent}
    if not inputs["dt_softplus"]:  # then the steps are used as they are: keep them positive
        inputs["dt"] = inputs["dt"].abs()
    if inputs["state_batch_indices"] is None:
        inputs["pad_slot_id"] = batch - 1  # says nothing then
    else:
        inputs["state_batch_indices"][1::4] = -1
    before = inputs["state"].clone()
    out, state = run(inputs, device)
    monkeypatch.setattr(module(), "launch", lambda *_: False)
    expected_out, expected_state = run(inputs, device)
    assert torch.equal(out, expected_out)
    assert torch.equal(state, expected_state)
    assert not torch.equal(state.cpu(), before)


@pytest.mark.parametrize("pad_slot_id", [-1, 0])
def test_padded_rows(device: torch.device, pad_slot_id: int) -> None:
    """Zeros whatever their inputs are, the null slot among the states untouched, and the rows between as without."""
    inputs = make(6, 132, 8)
    slots = torch.tensor([pad_slot_id, 4, pad_slot_id, pad_slot_id, 2, pad_slot_id], dtype=torch.int32)
    padded = slots == pad_slot_id
    inputs |= {"state_batch_indices": slots, "pad_slot_id": pad_slot_id}
    for name in ("x", "dt", "z", "B", "C"):
        inputs[name][padded] = float("nan")
    out, state = (y.cpu() for y in run(inputs, device))
    assert torch.equal(out[padded], torch.zeros(4, 132, dtype=out.dtype))
    others = [slot for slot in range(9) if slot not in (2, 4)]
    assert torch.equal(state[others], inputs["state"][others])
    for row, slot in ((1, 4), (4, 2)):
        mine = {name: inputs[name][row : row + 1] for name in ("x", "dt", "z", "B", "C")}
        alone, after = run(inputs | mine | {"state_batch_indices": slots[row : row + 1]}, device)
        assert torch.equal(out[row], alone[0].cpu())
        assert torch.equal(state[slot], after[slot].cpu())


def record(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], pdl: bool = True) -> tuple[str, Any, Any]:
    """Which kernel the Triton path would launch for a call on a Hopper GPU: its name, itself and the launch."""
    import tp_mamba.kernels.common.dependent_launch as dependent
    import tp_mamba.kernels.selective_state_update as op
    from tp_mamba.kernels.selective_state_update import any as any_layout
    from tp_mamba.kernels.selective_state_update import mixer

    homes = {"state_update_rows_kernel": mixer, "_selective_state_update_kernel": any_layout}
    launches = {name: Launches() for name in homes}
    kernels = {name: getattr(home, name) for name, home in homes.items()}
    with monkeypatch.context() as patch:
        for name, home in homes.items():
            patch.setattr(home, name, launches[name])
        patch.setattr(op, "use_triton", lambda x: True)
        patch.setattr(dependent, "has_dependent_launch", lambda device: pdl)
        selective_state_update(**inputs)
    ((name, call),) = [(name, call) for name, each in launches.items() for call in each.calls]
    return name, kernels[name], call


def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """``x`` with its strides, ``by`` elements into a buffer."""
    held = x.new_zeros(x.untyped_storage().nbytes() // x.element_size() + by)
    return held.as_strided(x.shape, x.stride(), by)


def wider(x: torch.Tensor, by: int) -> torch.Tensor:
    """``x`` as columns of a tensor with ``by`` more."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], by)], dim=-1)[..., : x.shape[-1]]


def test_choice_of_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not laid out in whole words goes to the general kernel."""
    plain = make(4, 36, 8)

    def chosen(inputs: dict[str, Any]) -> str:
        return record(monkeypatch, inputs)[0]

    served = [
        {},
        {"z": None, "D": None, "dt_bias": None},
        {"state_batch_indices": None},
        {"B": plain["B"][:, None], "C": plain["C"][:, None]},  # one group
        {"dt": wider(plain["dt"], 4)},
        {"dt": shifted(plain["dt"], 4)},
        {"D": shifted(plain["D"], 1)},
    ]
    for change in served:
        assert chosen(plain | change) == "state_update_rows_kernel", list(change)
    general = [
        {"x": shifted(plain["x"], 2)},
        {"dt": wider(plain["dt"], 2)},
        {"z": plain["z"].t().contiguous().t()},
        {"out": torch.zeros(4, 72, dtype=BFLOAT16)[:, ::2]},
        {"state": plain["state"].contiguous()},
        {"state": shifted(plain["state"], 2)},
        {"state": wider(plain["state"].mT, 2).mT},
        {"A": plain["A"].contiguous()},
        {"A": shifted(plain["A"], 2)},
        {"B": shifted(plain["B"], 2)},
        {"C": wider(plain["C"], 2)},
        {"C": plain["C"].t().contiguous().t()},
        {"B": plain["B"].view(4, 1, 8).repeat(1, 2, 1), "C": plain["C"].view(4, 1, 8).repeat(1, 2, 1)},
        {"D": plain["D"][:1].expand(36)},
        {"dt_bias": plain["dt_bias"].repeat_interleave(2)[::2]},
    ]
    for change in general:
        assert chosen(plain | change) == "_selective_state_update_kernel", list(change)
    for inputs in (make(4, 38, 8), make(4, 36, 12), make(4, 36, 2), make(4, 36, 64)):
        assert chosen(inputs) == "_selective_state_update_kernel", inputs["A"].shape


def test_a_mixer_decodes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs on the CPU: the layouts of a mixer and its cache are those that the kernel serves."""
    import tp_mamba.kernels.selective_state_update as op

    mixer = MambaMixer(16, 8, 4, 36, 4, True, False, False)
    cache = MambaCache([mixer], 4)
    slots = [cache.allocate() for _ in range(3)]
    metadata = MambaMetadataBuilder(torch.device("cpu")).build(decode_slots=slots)
    kernel = Launches()
    monkeypatch.setattr(module(), "state_update_rows_kernel", kernel)
    monkeypatch.setattr(op, "use_triton", lambda x: True)
    with torch.no_grad():
        mixer(torch.randn(3, 16), metadata, cache.layer(0))
    assert len(kernel.calls) == 1


def test_one_compilation_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for batch in (1, 2, 16, 33, 700):
        inputs = make(batch, 1024, 4)
        keys.add(specialization(*record(monkeypatch, inputs)[1:]))
        # A packed batch's first rows, and its others; states of a later layer; a single slot.
        inputs |= {name: inputs[name][batch // 2 :] for name in ("x", "dt", "z", "B", "C")}
        inputs["state_batch_indices"] = inputs["state_batch_indices"][batch // 2 :]
        inputs["state"] = inputs["state"][1:2] if batch == 1 else inputs["state"][1:]
        keys.add(specialization(*record(monkeypatch, inputs)[1:]))
    assert len(keys) == 1


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize(
    ("channels", "n", "softplus", "slots", "most"),
    [
        (256, 16, False, True, 340),
        (256, 16, False, False, 340),
        (140, 16, True, True, 440),
        (140, 32, True, True, 450),
        (256, 8, True, True, 430),
    ],
)
def test_machine_code(
    channels: int,
    n: int,
    softplus: bool,
    slots: bool,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """All states on their way before the first exponential, in whole words; shuffles for the output's sum alone."""
    inputs = make(2, channels, n)
    if not softplus:
        inputs |= {"dt_softplus": False, "dt_bias": None}
    if not slots:
        inputs["state_batch_indices"] = None
    compiled = compile_as_launched(*record(monkeypatch, inputs)[1:])
    assert stack_bytes(compiled, tmp_path) == 0
    assert registers(compiled, tmp_path) <= 64  # eight programs per multiprocessor
    assert compiled.metadata.shared == 0
    code = sass_of(compiled, tmp_path)
    names = [op.partition(".")[0] for op in code]
    assert not {"BAR", "LDS", "STS", "LDL", "STL"} & {*names}
    wait, exponential = code.index("ACQBULK"), names.index("MUFU")
    loads = [op for op in code[wait:] if op.startswith("LDG")]
    # Four of the states, one of B and C each; x, dt, z.
    assert sorted(loads) == 6 * ["LDG.E.128"] + 3 * ["LDG.E.64"]
    assert code[wait:exponential].count("LDG.E.128") >= 4
    assert [code.count(f"STG.E.{bits}") for bits in (128, 64)] == [4, 1]
    lanes = n // 4
    assert names.count("SHFL") == 4 * (lanes.bit_length() - 1)
    assert names.count("MUFU") == 4 * (4 + 2 + 2 * softplus)
    assert len(code) <= most


def test_early_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only static operands are read before the previous kernel has ended; without it, no such instruction."""
    inputs = make(2, 256, 4)
    compiled = compile_as_launched(*record(monkeypatch, inputs)[1:])
    assert not undeclared(compiled, "tp_mamba::selective_state_update")
    assert read_ahead(compiled) == {"A_ptr", "D_ptr", "dt_bias_ptr", "state_batch_indices_ptr"}
    compiled = compile_as_launched(*record(monkeypatch, inputs, pdl=False)[1:])
    assert not compiled.metadata.launch_pdl
    assert "griddepcontrol" not in compiled.asm["ptx"]
