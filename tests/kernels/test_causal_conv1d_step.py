"""The convolution's one-step kernel for a mixer's layout: its bits, when it runs, what it compiles to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conv_norm_testing import CUDA, INTERPRETER, assert_as_good, poison, run_on
from kernel_testing import Launches, compile_as_launched, sass_of, specialization, stack_bytes
from ptx_testing import read_ahead

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_update_reference

HERE = [INTERPRETER, CUDA]
PADDED = -7
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CALLS = [(2, True, "silu"), (3, False, "silu"), (4, True, None), (4, False, None), (4, True, "silu")]
# Channels in part of a block, whole words and not.
SIZES = [(1, 8), (3, 519), (33, 20), (3, 1024), (2, 30)]


def make(
    B: int, D: int, K: int, bias: bool, dtype: torch.dtype, *, state_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """A mixer's tensors: x a half of in_proj's rows, states with their channels contiguous, shuffled slots."""
    g = torch.Generator().manual_seed(B + D + K)
    slots = torch.randperm(B + 4, generator=g)[:B].int()
    x = torch.randn(B, 2 * D, generator=g).mul(2).to(dtype)[:, :D]
    if B > 1:
        slots[B // 2] = PADDED
        x[B // 2] = float("nan")  # a padded row may hold anything
    return {
        "x": x,
        "conv_state": torch.randn(B + 4, K - 1, D, generator=g).to(state_dtype or dtype).mT,
        "weight": torch.randn(D, K, generator=g).to(dtype),
        "bias": torch.randn(D, generator=g).to(dtype) if bias else None,
        "conv_state_indices": slots,
        "pad_slot_id": PADDED,
    }


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """On ``device``, x again a half of wider rows (``Tensor.to`` would close the gap)."""
    moved = {name: y.to(device) if isinstance(y, torch.Tensor) else y for name, y in inputs.items()}
    x = moved["x"]
    return moved | {"x": torch.cat([x, x], dim=1)[:, : x.shape[1]]}


def update(
    inputs: dict[str, Any], activation: str | None, *, step: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, states after it) of one of the two kernels, into memory full of NaN; ``inputs`` stay as they are."""
    from tp_mamba.kernels.causal_conv1d import mixer as module

    states = inputs["conv_state"].mT.clone().mT
    out = poison(torch.empty(inputs["x"].shape, dtype=inputs["x"].dtype, device=inputs["x"].device))
    launched: list[bool] = []
    original = module.launch

    def launch(*arguments: Any) -> bool:
        launched.append(step and original(*arguments))
        return launched[-1]

    with mock.patch.object(module, "launch", launch):
        causal_conv1d_update(**(inputs | {"conv_state": states}), activation=activation, out=out)
    assert launched == [step]
    return out, states


def check_bits(device: str, dtype: torch.dtype) -> None:
    for (K, bias, activation), (B, D) in zip(CALLS, SIZES, strict=True):
        check_case(device, make(B, D, K, bias, dtype), activation)
    # Every remainder of the channels by a word, in the mixer's call; other dtypes of state and slots; slot b for row b.
    for D in (5, 6, 7):
        check_case(device, make(3, D, 4, True, dtype), "silu")
    check_case(device, make(3, 20, 4, True, dtype, state_dtype=torch.float32), "silu")
    inputs = make(3, 20, 4, True, dtype)
    check_case(device, inputs | {"conv_state_indices": inputs["conv_state_indices"].long()}, "silu")
    inputs["x"].nan_to_num_(1.0)
    check_case(device, inputs | {"conv_state_indices": None}, "silu")
    # Weights that cannot be read as words: taps first in memory, and off an address of 16 bytes.
    check_case(device, inputs | {"weight": inputs["weight"].t().contiguous().t()}, "silu")
    check_case(device, inputs | {"weight": torch.cat([inputs["weight"]] * 2)[1:21]}, "silu")


def check_rows_a_program(device: str) -> None:
    """The bits are the same with several rows per program, the last of which has fewer; padded ones among them."""
    from tp_mamba.kernels.causal_conv1d import mixer as module

    for rows, batch, has_slots in ((2, 3, True), (4, 9, True), (2, 5, False)):
        inputs = make(batch, 20, 4, True, torch.bfloat16)
        if not has_slots:
            inputs["x"].nan_to_num_(1.0)
            inputs["conv_state_indices"] = None
        with mock.patch.object(module, "STEP", replace(module.STEP, BLOCK_B=rows)):
            check_case(device, inputs, "silu")


@pytest.mark.parametrize("where", HERE)
def test_bits_do_not_depend_on_rows_a_program(where: str) -> None:
    run_on(where, check_rows_a_program)


def check_case(device: str, inputs: dict[str, Any], activation: str | None) -> None:
    inputs = on(device, inputs)
    out, states = update(inputs, activation, step=True)
    expected, expected_states = update(inputs, activation, step=False)
    assert torch.equal(out, expected)
    assert torch.equal(states, expected_states)
    # And they are right: padded rows zero, unused slots as they were, the others shifted exactly.
    reference = {name: y for name, y in inputs.items() if name != "conv_state"}
    wide = {
        name: y.double() if isinstance(y, torch.Tensor) and y.is_floating_point() else y
        for name, y in reference.items()
    }
    right = inputs["conv_state"].clone()
    in_dtype = causal_conv1d_update_reference(conv_state=right, activation=activation, **reference)
    exact_states = inputs["conv_state"].double()
    exact = causal_conv1d_update_reference(conv_state=exact_states, activation=activation, **wide)
    assert_as_good(out, exact, in_dtype)
    assert torch.equal(states, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", HERE)
def test_bits_are_the_general_kernels(where: str, dtype: torch.dtype) -> None:
    run_on(where, check_bits, dtype)


def record(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], *, pdl: bool = True) -> tuple[Any, Any]:
    """The kernel that a call on a GPU would launch, and its launch; ``x`` may be ``[B, D]`` or ``[B, D, L]``."""
    from tp_mamba.kernels.causal_conv1d import any as general
    from tp_mamba.kernels.causal_conv1d import mixer as step

    kernels = {"_step_kernel": step._step_kernel, "_causal_conv1d_kernel": general._causal_conv1d_kernel}
    launches = {name: Launches() for name in kernels}
    early = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    with monkeypatch.context() as patch:
        patch.setattr(step, "_step_kernel", launches["_step_kernel"])
        patch.setattr(general, "_causal_conv1d_kernel", launches["_causal_conv1d_kernel"])
        patch.setattr(step, "early_start", lambda device: early)
        patch.setattr("tp_mamba.kernels.causal_conv1d.operator.use_triton", lambda x: True)
        function = causal_conv1d_update if "conv_state" in inputs else causal_conv1d_fn
        function(**inputs, activation="silu")
    (launched,) = (name for name in kernels if launches[name].calls)
    (call,) = launches[launched].calls
    return kernels[launched], call


def test_runs_for_a_mixers_layout_only(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(3, 16, 4, True, torch.bfloat16)
    x, state = inputs["x"], inputs["conv_state"]
    step, (_, options) = record(monkeypatch, inputs)
    assert step.__name__ == "_step_kernel"
    assert options["PER_THREAD"] > 1
    assert options["PACKED"]
    assert record(monkeypatch, inputs | {"x": x[..., None]})[0] is step
    others = {
        "strided channels": {"x": x.repeat_interleave(2, 1)[:, ::2]},
        "strided output": {"out": torch.empty(3, 32, dtype=x.dtype)[:, ::2]},
        "two tokens": {"x": torch.stack([x, x], 1).mT},
        "a longer state": {"conv_state": torch.zeros(7, 4, 16, dtype=x.dtype).mT},
        "inputs of a channel contiguous": {"conv_state": state.contiguous()},
    }
    for name, other in others.items():
        assert record(monkeypatch, inputs | other)[0].__name__ == "_causal_conv1d_kernel", name
    forward = {"x": x[..., None], "weight": inputs["weight"], "conv_states": state}
    assert record(monkeypatch, forward)[0].__name__ == "_causal_conv1d_kernel"


@pytest.mark.parametrize("moved", ["x", "out", "conv_state", "bias", "x's rows", "slots"])
def test_words_are_whole_or_not_taken(monkeypatch: pytest.MonkeyPatch, moved: str) -> None:
    """An address or a stride off the words: single channels are read, with the same kernel."""
    inputs = make(3, 16, 4, True, torch.bfloat16)
    off = torch.zeros(7 * 3 * 20 + 1, dtype=torch.bfloat16)[1:]
    change = {
        "x": {"x": off[:96].view(3, 32)[:, :16]},
        "out": {"out": off[:48].view(3, 16)},
        "conv_state": {"conv_state": off[: 7 * 48].view(7, 3, 16).mT},
        "bias": {"bias": off[:16]},
        "x's rows": {"x": torch.zeros(3, 33, dtype=torch.bfloat16)[:, :16]},
        "slots": {
            "conv_state": torch.zeros(7 * 49, dtype=torch.bfloat16).as_strided((7, 16, 3), (49, 1, 16))
        },
    }[moved]
    kernel, (_, options) = record(monkeypatch, inputs | change)
    assert kernel.__name__ == "_step_kernel"
    assert options["PER_THREAD"] == 1
    assert not options["PACKED"]


def test_no_batch_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for batch in (1, 2, 3, 16, 33, 256):
        inputs = make(batch, 64, 4, True, torch.bfloat16)
        keys.add(specialization(*record(monkeypatch, inputs)))
        wider = torch.zeros(batch, 3 * 64 + 4, dtype=torch.bfloat16)[
            :, 4:68
        ]  # another row stride, another offset
        slots = torch.arange(batch + 1, dtype=torch.int32)[1:]
        more = torch.zeros(2 * batch + 1, 3, 64, dtype=torch.bfloat16).mT
        changed = inputs | {"x": wider, "conv_state": more, "conv_state_indices": slots}
        keys.add(specialization(*record(monkeypatch, changed)))
    assert len(keys) == 1


@pytest.mark.pinned_toolchain
def test_compiles_for_sm90_without_exchange_or_spill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = compile_as_launched(*record(monkeypatch, make(8, 8192, 4, True, torch.bfloat16)))
    assert stack_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared == 0
    code = sass_of(compiled, tmp_path)
    assert not [op for op in code if op.startswith(("BAR", "LDS", "STS", "SHFL", "LDL", "STL", "CALL"))]
    # A slot; the weights of four channels; their bias, three past inputs and a new one.
    loads = [op for op in code if op.startswith("LDG")]
    assert sorted(loads) == ["LDG.E"] + 2 * ["LDG.E.128"] + 5 * ["LDG.E.64"]
    assert [op for op in code if op.startswith("STG")] == 4 * ["STG.E.64"]
    assert code.index("STG.E.64") > max(i for i, op in enumerate(code) if op.startswith("LDG"))
    assert read_ahead(compiled) == {"weight_ptr", "bias_ptr", "slot_ptr"}


@pytest.mark.parametrize(
    ("K", "dtype", "D"),
    [
        (2, torch.bfloat16, 64),
        (3, torch.float16, 64),
        (4, torch.float32, 64),
        (4, torch.bfloat16, 2731),
    ],
)
def test_other_forms_compile_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, K: int, dtype: torch.dtype, D: int
) -> None:
    compiled = compile_as_launched(*record(monkeypatch, make(2, D, K, True, dtype), pdl=False))
    assert stack_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared == 0
    assert not [op for op in sass_of(compiled, tmp_path) if op.startswith(("BAR", "SHFL"))]
    assert "griddepcontrol" not in compiled.asm["ptx"]


def test_a_longer_state_compiles_without_exchange_or_spill(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One token a row that this kernel does not take: the general one's launch of heads alone."""
    inputs = make(8, 8192, 4, True, torch.bfloat16)
    slots = inputs["conv_state"].shape[0]
    longer = torch.zeros(slots, 4, 8192, dtype=torch.bfloat16).mT
    kernel, launch = record(monkeypatch, inputs | {"conv_state": longer})
    assert kernel.__name__ == "_causal_conv1d_kernel"
    compiled = compile_as_launched(kernel, launch)
    assert stack_bytes(compiled, tmp_path) == 0
    assert not re.search(r"(ld|st)\.shared|shfl", compiled.asm["ptx"])


def check_far_slots(device: str) -> None:
    """Slots whose elements lie beyond 2**31."""
    D, slots = 8192, 90_000
    inputs = on(device, make(2, D, 4, True, torch.bfloat16) | {"conv_state": torch.zeros(2, 3, 1).mT})
    inputs["x"].nan_to_num_(1.0)
    far = torch.zeros(slots, 3, D, dtype=torch.bfloat16, device=device).mT
    assert far.untyped_storage().nbytes() // 2 > 2**31
    far[-2:] = torch.randn(2, D, 3, device=device)
    near = far[-2:].mT.clone().mT
    last = torch.tensor([slots - 2, slots - 1], dtype=torch.int32, device=device)
    out = causal_conv1d_update(
        **(inputs | {"conv_state": far, "conv_state_indices": last}), activation="silu"
    )
    expected = causal_conv1d_update(
        **(inputs | {"conv_state": near, "conv_state_indices": last - last[0]}), activation="silu"
    )
    assert torch.equal(out, expected)
    assert torch.equal(far[-2:], near)
    assert not far[:-2].any()


@pytest.mark.parametrize("where", [CUDA])
def test_far_slots(where: str) -> None:
    run_on(where, check_far_slots)


def check_early_start(device: str) -> None:
    """In a graph whose kernels ahead still write x, weights, slots and states: the bits of a plain launch.

    Each of x, weights, bias and slots is once the last that is written, right ahead of the kernel.
    """
    from tp_mamba.kernels.causal_conv1d import mixer as module

    inputs = on(device, make(32, 8192, 4, True, torch.bfloat16))
    inputs["conv_state"] = inputs["conv_state"].mT.contiguous().mT
    source = {name: y.clone() for name, y in inputs.items() if isinstance(y, torch.Tensor)}
    outs = [torch.empty(32, 8192, dtype=torch.bfloat16, device=device) for _ in range(4)]

    def chain() -> None:
        names = ("weight", "bias", "conv_state_indices", "x")
        for i, out in enumerate(outs):
            for name in names[i:] + names[:i]:
                inputs[name].zero_()
                inputs[name].copy_(source[name])
            causal_conv1d_update(**inputs, activation="silu", out=out)

    results = []
    for early in (True, False):
        options = module.early_start(torch.device(device)) if early else {"PDL": False}
        with mock.patch.object(module, "early_start", lambda device, options=options: options):
            chain()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
        inputs["conv_state"].copy_(source["conv_state"])
        for out in outs:
            poison(out)
        graph.replay()
        results.append([*(out.clone() for out in outs), inputs["conv_state"].clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("where", [CUDA])
def test_early_start_reads_nothing_too_early(where: str) -> None:
    run_on(where, check_early_start)
