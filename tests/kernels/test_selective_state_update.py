"""One-step state update: the Triton kernel (interpreted, and on a GPU) and the CPU path against float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
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
from tp_mamba.kernels.selective_state_update import selective_state_update
from tp_mamba.kernels.selective_state_update.reference import selective_state_update_reference


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


@pytest.fixture(params=[*DEVICES, "cpu"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Both implementations: Triton as in ``device``, and plain torch."""
    return torch.device("cpu") if request.param == "cpu" else triton_device(request.param, monkeypatch)


def make(
    batch: int,
    channels: tuple[int, ...],
    n: int,
    dtype: torch.dtype = torch.float32,
    groups: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments without the state; rows are halves of wider ones, as x and z of a projection are."""
    g = torch.Generator().manual_seed(seed)
    wide = (batch, *channels[:-1], 2 * channels[-1])
    xz = torch.randn(wide, generator=g).to(dtype)
    bc = torch.randn(*((batch,) if groups is None else (batch, groups)), 2 * n, generator=g)
    return {
        "x": xz[..., : channels[-1]],
        "dt": torch.randn(batch, *channels, generator=g).to(dtype),
        "A": -torch.exp(torch.rand(*channels, n, generator=g) * 4 - 1),
        "B": bc[..., :n],
        "C": bc[..., n:],
        "D": torch.randn(channels, generator=g),
        "z": xz[..., channels[-1] :],
        "dt_bias": torch.rand(channels, generator=g) * 5 - 7,
        "dt_softplus": True,
    }


def check(
    inputs: dict[str, Any], state: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and state of one call within twice the reference's error; returns both, on the CPU."""
    exact_state, reference_state, actual_state = state.double(), state.clone(), state.to(device, copy=True)
    exact = selective_state_update_reference(exact_state, **double(inputs))
    reference = selective_state_update_reference(reference_state, **inputs)
    on_device = to(inputs, device)
    # Triton's interpreter truncates to bfloat16: there, torch rounds.
    rounds = device.type == "cuda" or inputs["x"].dtype != torch.bfloat16
    out = poisoned_like(on_device["x"] if rounds else on_device["x"].float())
    assert selective_state_update(actual_state, **on_device, out=out) is out
    assert_within_twice(out.to(reference.dtype), reference, exact)
    assert_within_twice(actual_state, reference_state, exact_state)
    return out.cpu(), actual_state.cpu()


def random_state(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 8, 16, 24])
def test_matches_float64(any_device: torch.device, n: int, dtype: torch.dtype) -> None:
    check(make(3, (37,), n, dtype, seed=n), random_state(3, 37, n), any_device)


def test_largest_state(any_device: torch.device) -> None:
    check(make(2, (20,), 256, seed=3), random_state(2, 20, 256), any_device)


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("pad_slot_id", [-1, 0])
@pytest.mark.parametrize("indices", [[4, 2, 7], [4, None, 7], [None, None], [6], [None]])
def test_slots(
    any_device: torch.device, indices: list[int | None], pad_slot_id: int, state_dtype: torch.dtype
) -> None:
    """Rows at the null slot output zeros; every slot not named keeps its bits."""
    slots = [pad_slot_id if slot is None else slot for slot in indices]
    inputs = make(len(slots), (33,), 4, seed=len(slots))
    inputs |= {"state_batch_indices": torch.tensor(slots, dtype=torch.int32), "pad_slot_id": pad_slot_id}
    state = random_state(8, 33, 4, dtype=state_dtype)
    out, after = check(inputs, state, any_device)
    padded = [row for row, slot in enumerate(indices) if slot is None]
    assert torch.equal(out[padded], torch.zeros(len(padded), 33))
    untouched = [slot for slot in range(8) if slot not in indices]
    assert torch.equal(after[untouched], state[untouched])


def test_more_slots_than_rows(any_device: torch.device) -> None:
    state = random_state(5, 6, 3)
    _, after = check(make(2, (6,), 3, seed=5), state, any_device)
    assert torch.equal(after[2:], state[2:])


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "dt_softplus"])
def test_optional_arguments(any_device: torch.device, absent: str) -> None:
    inputs = make(2, (30,), 4, seed=7)
    if absent == "dt_softplus":  # then the steps are used as they are: keep them positive
        inputs |= {
            "dt_softplus": False,
            "dt": inputs["dt"].abs() * 0.1,
            "dt_bias": inputs["dt_bias"].abs() * 0.01,
        }
    else:
        inputs[absent] = None
    check(inputs, random_state(2, 30, 4), any_device)


@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)  # in the branch not taken
@pytest.mark.parametrize("step", TIME_STEPS)
def test_softplus_at_every_size(any_device: torch.device, step: float) -> None:
    """From a zero state and without a skip, so that output and state are as exact as the time steps are."""
    g = torch.Generator().manual_seed(9)
    inputs = make(4, (33,), 4, seed=9)
    inputs |= {
        "dt": step / 2 + 0.2 * torch.randn(4, 33, generator=g),
        "dt_bias": step / 2 + 0.2 * torch.randn(33, generator=g),
        "D": None,
        "z": None,
    }
    check(inputs, torch.zeros(4, 33, 4), any_device)


@pytest.mark.parametrize(
    ("channels", "groups"), [((6,), 1), ((12,), 3), ((4, 5), None), ((4, 5), 2), ((3, 6), 3)]
)
def test_groups_and_heads(any_device: torch.device, channels: tuple[int, ...], groups: int | None) -> None:
    inputs = make(2, channels, 5, groups=groups, seed=11)
    inputs["state_batch_indices"] = torch.tensor([3, 1])
    check(inputs, random_state(4, *channels, 5), any_device)


def test_expanded_heads_and_strided_state(any_device: torch.device) -> None:
    """mamba_ssm's tied heads: A, dt, D and dt_bias are one number a head, expanded; and a state of odd strides."""
    inputs = make(2, (3, 8), 4, seed=13)
    inputs["A"] = inputs["A"][:, :1, :1].expand(3, 8, 4)
    inputs["dt"] = inputs["dt"][..., :1].expand(2, 3, 8)
    for name in ("D", "dt_bias"):
        inputs[name] = inputs[name][:, :1].expand(3, 8)
    check(inputs, random_state(2, 3, 8, 4), any_device)
    wide = random_state(2, 8, 9).to(any_device)
    state, before = wide[:, ::2, 1:6].transpose(1, 2), wide.clone()  # [2, 5, 4], channels contiguous
    plain = to(make(2, (5,), 4, seed=17), any_device)
    contiguous = state.contiguous()
    expected = selective_state_update(contiguous, **plain)
    assert torch.equal(selective_state_update(state, **plain), expected)
    assert torch.equal(state, contiguous)
    assert torch.equal(wide[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("n", [3, 16])
def test_decode_continues_the_scan_bit_for_bit(device: torch.device, n: int) -> None:
    """Prefill then single steps gives the bits of one scan over everything."""
    g = torch.Generator().manual_seed(19)
    d, length, prompt = 40, 7, 4
    u, delta, z = (torch.randn(length, d, generator=g).to(device) for _ in range(3))
    B, C = (torch.randn(length, n, generator=g).to(device) for _ in range(2))
    A = -torch.exp(torch.randn(d, n, generator=g)).to(device)
    skip, bias = (torch.randn(d, generator=g).to(device) for _ in range(2))

    def scan(stop: int, state: torch.Tensor) -> torch.Tensor:
        tokens = [x[:stop].t() for x in (u, delta, B, C, z)]
        start = torch.tensor([0, stop], dtype=torch.int32, device=device)
        out = selective_scan_fn(
            *tokens[:2], A, *tokens[2:4], skip, tokens[4], bias, True, query_start_loc=start, ssm_states=state
        )
        assert isinstance(out, torch.Tensor)
        return out.t()

    whole_state, state = torch.zeros(1, d, n, device=device), torch.zeros(1, d, n, device=device)
    whole = scan(length, whole_state)
    pieces = [scan(prompt, state)]
    for t in range(prompt, length):
        row = slice(t, t + 1)
        pieces.append(
            selective_state_update(state, u[row], delta[row], A, B[row], C[row], skip, z[row], bias, True)
        )
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(state, whole_state)


def test_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    inputs = to(make(3, (33,), 16, seed=23), device)
    state = random_state(3, 33, 16).to(device)
    together = state.clone()
    out = selective_state_update(together, **inputs)
    for row in range(3):
        mine = {k: v[row : row + 1] if k in ("x", "dt", "z", "B", "C") else v for k, v in inputs.items()}
        alone = state[row : row + 1].clone()
        assert torch.equal(selective_state_update(alone, **mine), out[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_float64_is_exact() -> None:
    inputs, state = double(make(2, (9,), 5, seed=29)), random_state(2, 9, 5).double()
    exact_state = state.clone()
    exact = selective_state_update_reference(exact_state, **inputs)
    torch.testing.assert_close(selective_state_update(state, **inputs), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, exact_state, rtol=1e-12, atol=1e-12)


def test_compiled_and_opcheck() -> None:
    inputs, state = make(2, (6,), 4, seed=31), random_state(4, 6, 4)
    inputs["state_batch_indices"] = torch.tensor([3, -1], dtype=torch.int32)
    eager_state, compiled_state = state.clone(), state.clone()
    eager = selective_state_update(eager_state, **inputs)
    compiled = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(compiled_state, **inputs), eager)
    assert torch.equal(compiled_state, eager_state)
    args = (state, *inputs.values(), -1, torch.empty_like(inputs["x"]))
    torch.library.opcheck(torch.ops.tp_mamba.selective_state_update.default, args)


def record(monkeypatch: pytest.MonkeyPatch, state: torch.Tensor, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """The kernel, and the launch that the Triton path would make for a call."""
    import tp_mamba.kernels.selective_state_update as op
    import tp_mamba.kernels.selective_state_update.any as module

    launches, kernel = Launches(), module._selective_state_update_kernel
    with monkeypatch.context() as patch:
        patch.setattr(module, "_selective_state_update_kernel", launches)
        patch.setattr(op, "use_triton", lambda x: True)
        selective_state_update(state, **inputs)
    return kernel, launches.calls[0]


def test_one_compilation_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for batch in (1, 2, 16, 33):
        inputs = make(batch, (16,), 16, torch.bfloat16)
        inputs["state_batch_indices"] = torch.zeros(batch, dtype=torch.int32)
        keys.add(specialization(*record(monkeypatch, random_state(batch, 16, 16), inputs)))
    assert len(keys) == 1


def test_compiles_for_hopper_without_spills(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inputs = make(2, (32,), 16, torch.bfloat16)
    inputs["state_batch_indices"] = torch.zeros(2, dtype=torch.int32)
    compiled = compile_for_hopper(*record(monkeypatch, random_state(2, 32, 16), inputs))
    assert stack_bytes(compiled, tmp_path) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6)}, "x has 1 dimensions but must be [B, D] or [B, heads, D]"),
        ({"x": torch.zeros(2, 6, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"dt": torch.zeros(2, 5)}, "dt has shape [2, 5] but [B, D] is [2, 6]"),
        ({"A": torch.zeros(6)}, "A has shape [6] but x of shape [2, 6] wants [D] and N"),
        ({"A": torch.zeros(5, 4)}, "A has shape [5, 4] but [D, N] is [6, 4]"),
        ({"A": torch.zeros(6, 257)}, "N of 257 but N must be 1 to 256"),
        ({"B": torch.zeros(3, 4)}, "B has shape [3, 4] but must be [B, N] or [B, G, N]"),
        ({"C": torch.zeros(2, 1, 4)}, "C has shape [2, 1, 4] but the shape of B is [2, 4]"),
        (
            {"B": torch.zeros(2, 4, 4), "C": torch.zeros(2, 4, 4)},
            "B has 4 groups for 6 channels but G must divide",
        ),
        ({"D": torch.zeros(1, 6)}, "D has shape [1, 6]"),
        ({"z": torch.zeros(2, 7)}, "z has shape [2, 7]"),
        ({"dt_bias": torch.zeros(6, device="meta")}, "dt_bias is on meta but x is on cpu"),
        ({"out": torch.zeros(1, 6)}, "out has shape [1, 6]"),
        ({"state_batch_indices": torch.zeros(2)}, "state_batch_indices has dtype torch.float32"),
        ({"state_batch_indices": torch.zeros(3, dtype=torch.int32)}, "state_batch_indices has shape [3]"),
        ({"state": torch.zeros(2, 6, 5)}, "state has shape [2, 6, 5] but must be [slots, *A.shape]"),
        ({"state": torch.zeros(1, 6, 4)}, "at least 2 slots"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    inputs = {"state": random_state(2, 6, 4)} | make(2, (6,), 4) | change
    with pytest.raises(ValueError, match=r"^selective_state_update: ") as refusal:
        selective_state_update(**inputs)
    assert message in str(refusal.value)


def test_no_gradient_is_cut_silently() -> None:
    inputs = make(1, (6,), 4)
    inputs["dt_bias"].requires_grad_()
    with pytest.raises(RuntimeError, match="dt_bias requires grad but this op has no backward"):
        selective_state_update(random_state(1, 6, 4), **inputs)
