"""Selective scan: the Triton kernel (interpreted, and on a GPU) and the CPU path against the float64 reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernel_testing import (
    DEVICES,
    TIME_STEPS,
    Launches,
    assert_within_twice,
    compile_for_hopper,
    double,
    poisoned_like,
    specialization,
    stack_bytes,
    to,
    triton_device,
)

from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_scan.reference import selective_scan_reference


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


@pytest.fixture(params=[*DEVICES, "cpu"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Both implementations: Triton as in ``device``, and plain torch."""
    return torch.device("cpu") if request.param == "cpu" else triton_device(request.param, monkeypatch)


def make(
    d: int,
    n: int,
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "token_major",
    seed: int = 0,
) -> dict[str, Any]:
    """A packed batch of realistic spread: time steps from 1e-4 to 1, one above the threshold, all decays."""
    g = torch.Generator().manual_seed(seed)
    t = sum(lengths)

    def by_token(scale: float) -> torch.Tensor:
        if layout == "channel_major":
            return (scale * torch.randn(d, t, generator=g)).to(dtype)
        if layout == "strided":  # every other channel of every third token
            return (scale * torch.randn(3 * t, 2 * d, generator=g)).to(dtype)[::3, ::2].t()
        return (scale * torch.randn(t, d, generator=g)).to(dtype).t()

    delta = by_token(1.0)
    u = by_token(1.0)
    delta[0, :1], u[0, :1] = (
        30.0,
        0.02,
    )  # above the threshold of softplus, and no larger in effect than the rest
    projected = torch.randn(t, 5 + 2 * n, generator=g)
    return {
        "u": u,
        "delta": delta,
        "A": -torch.exp(torch.rand(d, n, generator=g) * 4 - 1),
        "B": projected[:, 5 : 5 + n].t(),
        "C": projected[:, 5 + n :].t(),
        "D": torch.randn(d, generator=g),
        "z": by_token(1.5),
        "delta_bias": torch.rand(d, generator=g) * 5 - 7,
        "delta_softplus": True,
        "query_start_loc": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(),
    }


def check(inputs: dict[str, Any], device: torch.device) -> None:
    """Output and last state of one call within twice the reference's error."""
    exact, exact_last = selective_scan_reference(**double(inputs))
    reference, reference_last = selective_scan_reference(**inputs)
    on_device = to(inputs, device)
    # Triton's interpreter truncates to bfloat16: there, torch rounds.
    rounds = device.type == "cuda" or inputs["u"].dtype != torch.bfloat16
    out = poisoned_like(on_device["u"] if rounds else on_device["u"].float())
    returned, last = selective_scan_fn(**on_device, return_last_state=True, out=out)
    assert returned is out
    # The decay is 2 to a product that is rounded once more than that of exp.
    assert_within_twice(out.to(reference.dtype), reference, exact, approximate=0.05)
    assert_within_twice(last, reference_last, exact_last, approximate=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 8, 16, 24])
def test_matches_float64(any_device: torch.device, n: int, dtype: torch.dtype) -> None:
    check(make(37, n, [11, 0, 1, 4, 0], dtype, seed=n), any_device)


def test_largest_state(any_device: torch.device) -> None:
    check(make(20, 256, [5], seed=3), any_device)


@pytest.mark.parametrize("layout", ["channel_major", "strided"])
def test_any_strides(any_device: torch.device, layout: str) -> None:
    check(make(35, 8, [6, 3], layout=layout, seed=5), any_device)


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "delta_softplus"])
def test_optional_arguments(any_device: torch.device, absent: str) -> None:
    inputs = make(30, 4, [7], seed=7)
    if absent == "delta_softplus":  # then the steps are used as they are: keep them positive
        inputs |= {
            "delta_softplus": False,
            "delta": inputs["delta"].abs() * 0.1,
            "delta_bias": inputs["delta_bias"].abs(),
        }
    else:
        inputs[absent] = None
    check(inputs, any_device)


@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)  # in the branch not taken
@pytest.mark.parametrize("step", TIME_STEPS)
def test_softplus_at_every_size(any_device: torch.device, step: float) -> None:
    """Alike sizes in each call and no skip, so that output and state are as exact as the time steps are."""
    g = torch.Generator().manual_seed(9)
    inputs = make(33, 4, [6, 3], seed=9)
    inputs |= {
        "delta": (step / 2 + 0.2 * torch.randn(9, 33, generator=g)).t(),
        "delta_bias": step / 2 + 0.2 * torch.randn(33, generator=g),
        "D": None,
        "z": None,
    }
    check(inputs, any_device)


@pytest.mark.parametrize("form", ["constant", "per_token", "groups", "constant_b", "unequal_groups"])
def test_dense_batch_of_mamba_ssm(any_device: torch.device, form: str) -> None:
    """Channel-major ``[B, D, L]`` with every form of B and C that mamba_ssm takes."""
    g = torch.Generator().manual_seed(11)
    b, d, n, length = 2, 12, 3, 9
    forms = {
        "constant": (d, n),
        "per_token": (b, n, length),
        "groups": (b, 2, n, length),
        "three": (b, 3, n, length),
    }
    b_form = {"constant_b": "constant", "unequal_groups": "three"}.get(form, form)
    c_form = {"constant_b": "groups", "unequal_groups": "groups"}.get(form, form)
    inputs = {
        "u": torch.randn(b, d, length, generator=g),
        "delta": torch.randn(b, d, length, generator=g),
        "A": -torch.exp(torch.randn(d, n, generator=g)),
        "B": torch.randn(forms[b_form], generator=g),
        "C": torch.randn(forms[c_form], generator=g),
        "D": torch.randn(d, generator=g),
        "z": torch.randn(b, d, length, generator=g),
        "delta_softplus": True,
    }
    check(inputs, any_device)


@pytest.mark.parametrize("pad_slot_id", [-1, 0])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
def test_states_and_slots(any_device: torch.device, pad_slot_id: int, state_dtype: torch.dtype) -> None:
    """Initial states, a fresh one, an empty sequence and one without a slot; other slots keep their bits."""
    inputs = make(35, 4, [5, 3, 0, 2, 0], seed=13)
    states = torch.randn(9, 35, 4, generator=torch.Generator().manual_seed(1)).to(state_dtype)
    inputs |= {
        "cache_indices": torch.tensor([3, 8, 2, pad_slot_id, 5], dtype=torch.int32),
        "has_initial_state": torch.tensor([True, False, True, True, False]),
        "pad_slot_id": pad_slot_id,
    }
    exact_states, reference_states = states.double(), states.clone()
    exact, _ = selective_scan_reference(**double(inputs), ssm_states=exact_states)
    reference, _ = selective_scan_reference(**inputs, ssm_states=reference_states)
    actual_states = states.to(any_device, copy=True)
    on_device = to(inputs, any_device)
    out = selective_scan_fn(**on_device, ssm_states=actual_states, out=poisoned_like(on_device["u"]))
    assert isinstance(out, torch.Tensor)
    assert_within_twice(out, reference, exact)
    actual_states = actual_states.cpu()
    for slot in (3, 8):
        assert_within_twice(actual_states[slot], reference_states[slot], exact_states[slot])
    assert torch.equal(actual_states[5], torch.zeros_like(actual_states[5]))
    untouched = [0, 1, 2, 4, 6, 7]  # slot 2: the empty sequence hands on what it started with
    assert torch.equal(actual_states[untouched], states[untouched])


def test_slots_default_to_the_sequence(any_device: torch.device) -> None:
    inputs = to(make(4, 4, [3, 2], seed=17), any_device)
    states = torch.full((3, 4, 4), float("nan"), device=any_device)
    _, last = selective_scan_fn(**inputs, ssm_states=states, return_last_state=True)
    assert torch.equal(states[:2], last)
    assert states[2].isnan().all()


@pytest.mark.parametrize("n", [3, 16])
def test_cut_anywhere_bit_equal(device: torch.device, n: int) -> None:
    """A prompt cut in two with its state carried gives the bits of the whole, also beside other sequences."""
    length = 9
    inputs = to(make(33, n, [length], seed=19), device)
    whole, last = selective_scan_fn(**inputs, return_last_state=True)
    by_token = ("u", "delta", "z", "B", "C")
    cuts = range(1, length) if n == 3 else (4, 5)
    for cut in cuts:
        states = torch.full((2, 33, n), float("nan"), device=device)
        slot = torch.tensor([1], dtype=torch.int32, device=device)
        pieces = []
        for start, stop, continues in ((0, cut, False), (cut, length, True)):
            piece = {k: v[:, start:stop] if k in by_token else v for k, v in inputs.items()}
            piece["query_start_loc"] = torch.tensor([0, stop - start], dtype=torch.int32, device=device)
            initial = torch.tensor([continues], device=device)
            pieces.append(
                selective_scan_fn(**piece, ssm_states=states, cache_indices=slot, has_initial_state=initial)
            )
        assert torch.equal(torch.cat(pieces, dim=1), whole)
        assert torch.equal(states[1], last[0])
    # The same tokens between two others: the same bits.
    around = to(make(33, n, [2, length, 3], seed=23), device)
    for name in by_token:
        around[name][:, 2 : 2 + length] = inputs[name]
    around |= {name: inputs[name] for name in ("A", "D", "delta_bias")}
    assert torch.equal(selective_scan_fn(**around)[:, 2 : 2 + length], whole)


def test_cpu_path_many_lengths() -> None:
    """Chunks of every kind: more sequences than chunks, one long among short, several blocks of channels."""
    for lengths in ([1], [2, 3], [0, 50, 1, 0, 7], [16, 16], [5] * 20, []):
        inputs = make(30, 4, lengths, seed=len(lengths))
        check(inputs, torch.device("cpu")) if sum(lengths) else selective_scan_fn(**inputs)


def test_cpu_path_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp_mamba.kernels.selective_scan.cpu._BLOCK_ELEMENTS", 40 * 4 * 2)
    check(make(7, 4, [30, 6], seed=29), torch.device("cpu"))
    grouped = make(12, 4, [30, 6], seed=31)
    g = torch.Generator().manual_seed(31)
    for groups in (2, 4, 12):  # groups larger than a block, smaller, and single channels
        grouped["B"] = torch.randn(groups, 4, 36, generator=g)
        grouped["C"] = torch.randn(groups, 4, 36, generator=g)
        check(grouped, torch.device("cpu"))


def test_cpu_path_extreme_decay() -> None:
    """Decays that underflow at once and decays of exactly one, in float32."""
    inputs = make(30, 2, [40], seed=37)
    inputs["A"] = torch.tensor([[-1e4, -1e-6]] * 30)
    check(inputs, torch.device("cpu"))
    inputs["A"] = torch.zeros(30, 2)
    check(inputs, torch.device("cpu"))


def test_float64_is_exact() -> None:
    inputs = double(make(5, 6, [23, 4], seed=41))
    exact, exact_last = selective_scan_reference(**inputs)
    out, last = selective_scan_fn(**inputs, return_last_state=True)
    assert last.dtype == torch.float64
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, exact_last, rtol=1e-12, atol=1e-12)


def test_compiled_and_opcheck() -> None:
    inputs = make(4, 4, [5, 3], seed=43)
    extra = {
        "cache_indices": torch.tensor([2, 0], dtype=torch.int32),
        "has_initial_state": torch.tensor([True, False]),
    }
    states = torch.randn(3, 4, 4)
    eager_states, compiled_states = states.clone(), states.clone()
    eager = selective_scan_fn(**inputs, **extra, ssm_states=eager_states)
    compiled = torch.compile(selective_scan_fn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, **extra, ssm_states=compiled_states), eager)
    assert torch.equal(compiled_states, eager_states)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "query_start_loc")
    args = [inputs[name] for name in order]
    args[3], args[4] = args[3][None], args[4][None]
    tail = (*extra.values(), states, torch.empty(2, 4, 4), -1, torch.empty_like(inputs["u"]))
    torch.library.opcheck(torch.ops.tp_mamba.selective_scan.default, (*args, *tail))


def record(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], **extra: Any) -> tuple[Any, Any]:
    """The kernel, and the launch that the Triton path would make for a call."""
    import tp_mamba.kernels.selective_scan.any as module

    launches, kernel = Launches(), module._selective_scan_kernel
    with monkeypatch.context() as patch:
        patch.setattr(module, "_selective_scan_kernel", launches)
        patch.setattr("tp_mamba.kernels.selective_scan.operator.use_triton", lambda x: True)
        selective_scan_fn(**inputs, **extra)
    return kernel, launches.calls[0]


def test_one_compilation_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for seed, lengths in enumerate(([1], [16], [17, 3], [0, 0, 5], [128] * 2)):
        inputs = make(16, 16, [2, *lengths], torch.bfloat16, seed=seed)
        for name in ("u", "delta", "z", "B", "C"):  # an offset that is not a multiple of 16 bytes
            inputs[name] = inputs[name][:, 1:]
        slots = torch.arange(len(lengths) + 1, dtype=torch.int32)
        states = torch.zeros(len(lengths) + 1 + seed, 16, 16)
        keys.add(specialization(*record(monkeypatch, inputs, ssm_states=states, cache_indices=slots)))
    assert len(keys) == 1
    dense = set()
    for b, length in ((1, 2), (16, 16), (3, 17)):
        x = torch.randn(b, 16, length)
        inputs = {"u": x, "delta": x, "A": -torch.ones(16, 16), "B": torch.randn(b, 16, length)}
        dense.add(specialization(*record(monkeypatch, inputs | {"C": inputs["B"]})))
    assert len(dense) == 1


def test_compiles_for_hopper_without_spills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mixer's own call, bfloat16 and N = 16: states stay in registers, and from Triton 3.7 on nothing goes
    through shared memory (3.6 takes one change of layout through it)."""
    inputs = make(32, 16, [4], torch.bfloat16)
    slot, initial = torch.tensor([1], dtype=torch.int32), torch.tensor([True])
    states = torch.zeros(2, 32, 16)
    launch = record(monkeypatch, inputs, ssm_states=states, cache_indices=slot, has_initial_state=initial)
    compiled = compile_for_hopper(*launch)
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        assert compiled.metadata.shared == 0
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 4, 6)}, "u has 3 dimensions but [D, T]"),
        ({"u": torch.zeros(4, 6, dtype=torch.int64)}, "u has dtype torch.int64"),
        ({"delta": torch.zeros(4, 5)}, "delta has shape [4, 5] but [D, T] is [4, 6]"),
        ({"z": torch.zeros(3, 6)}, "z has shape [3, 6]"),
        ({"out": torch.zeros(4, 7)}, "out has shape [4, 7]"),
        ({"A": torch.zeros(4)}, "A has shape [4] but must be [D, N]"),
        ({"A": torch.zeros(5, 2)}, "A has shape [5, 2] but [D, N] is [4, 2]"),
        ({"A": torch.zeros(4, 300)}, "N of 300 but N must be 1 to 256"),
        ({"A": torch.zeros(4, 2, dtype=torch.complex64)}, "A has dtype torch.complex64"),
        ({"B": torch.zeros(2, 5)}, "B has shape [2, 5] but must be [N, T] or [G, N, T]"),
        ({"C": torch.zeros(3, 2, 6)}, "C has 3 groups for 4 channels but G must divide D"),
        ({"D": torch.zeros(5)}, "D has shape [5]"),
        ({"delta_bias": torch.zeros(1)}, "delta_bias has shape [1]"),
        ({"delta_bias": torch.zeros(4, device="meta")}, "delta_bias is on meta but u is on cpu"),
        ({"query_start_loc": torch.zeros(2)}, "query_start_loc has dtype torch.float32"),
        ({"query_start_loc": torch.zeros(1, 2, dtype=torch.int32)}, "query_start_loc has shape [1, 2]"),
        ({"cache_indices": torch.zeros(1, dtype=torch.int32)}, "cache_indices was given without ssm_states"),
        (
            {"has_initial_state": torch.zeros(1, dtype=torch.bool)},
            "has_initial_state was given without ssm_states",
        ),
        ({"cache_indices": torch.zeros(0, dtype=torch.int32)}, "cache_indices has shape [0] but [S] is [1]"),
        ({"has_initial_state": torch.zeros(1)}, "has_initial_state has dtype torch.float32 but must be bool"),
        ({"ssm_states": torch.zeros(1, 4, 3)}, "ssm_states has shape [1, 4, 3] but must be [slots, D, N]"),
        ({"ssm_states": torch.zeros(0, 4, 2)}, "at least 1 slots"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    inputs = make(4, 2, [6])
    with pytest.raises(ValueError, match=r"^selective_scan_fn: ") as refusal:
        selective_scan_fn(**(inputs | change))
    assert message in str(refusal.value)


def test_dense_refusals() -> None:
    x = torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match=r"u has 2 dimensions but \[B, D, L\] is expected here"):
        selective_scan_fn(x[0], x[0], torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"B has shape \[4, 3\] but \[D, N\] is \[4, 2\]"):
        selective_scan_fn(x, x, torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4, 2))
