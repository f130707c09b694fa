"""Gradients of the selective scan against autograd through its definition in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_testing import assert_within_twice, double, to
from test_selective_scan import make

from tp_mamba.kernels.compat.mamba_ssm import selective_scan_fn as scan_of_mamba_ssm
from tp_mamba.kernels.selective_scan import selective_scan, selective_scan_fn
from tp_mamba.kernels.selective_scan.reference import (
    selective_scan_gradients_reference,
    selective_scan_reference,
)

BY_TOKEN = ("u", "delta", "z", "B", "C")

APPROXIMATIONS = {
    "cpu": {"approximate": 0.25},
    "cuda": {"approximate": 2 / 3**0.5, "worst": 10},
}
"""What the kernels' own exponentials, logarithms and divisions may add, for :func:`assert_within_twice`.

On a GPU each errs by up to 2 ulp. In the worst element all five enter: the decay's exponential, the gate's exponential
and division, softplus's exponential and logarithm. On the average it is one of them, evenly spread over those 2 ulp.
"""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def any_device(request: pytest.FixtureRequest) -> torch.device:
    """Plain torch, and Triton on a GPU; what its interpreter runs is in ``test_selective_scan_backward_kernels.py``."""
    return torch.device(request.param)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def split(inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The floating tensors of a call, and the rest of it."""
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return tensors, {k: v for k, v in inputs.items() if k not in tensors and v is not None}


def run(
    inputs: dict[str, Any],
    grad_out: torch.Tensor | None,
    grad_final: torch.Tensor | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The gradients of every tensor among ``inputs`` for those of the output and of the final states."""
    tensors, rest = split(inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, final = selective_scan(**leaves, **rest, return_final_states=True, **options)
    given = [(x, grad) for x, grad in ((out, grad_out), (final, grad_final)) if grad is not None]
    grads = torch.autograd.grad([x for x, _ in given], list(leaves.values()), [grad for _, grad in given])
    return dict(zip(leaves, grads, strict=True))


def reference(
    inputs: dict[str, Any], grad_out: torch.Tensor | None, grad_final: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    tensors, rest = split(inputs)
    return selective_scan_gradients_reference(tensors, grad_out, grad_final, **rest)


def check(
    inputs: dict[str, Any],
    device: torch.device,
    grad_final: torch.Tensor | None = None,
    actual: dict[str, torch.Tensor] | None = None,
) -> None:
    """Every gradient of one call within twice the reference's error in the dtypes of ``inputs`` on that device.

    A GPU's exponential errs by 2 ulp, in the reference as in the kernels, a CPU's by half of one.
    """
    grad_out = torch.empty_like(inputs["u"]).copy_(randn(*inputs["u"].shape, seed=99))
    wide = {"grad_out": grad_out.double(), "grad_final": None if grad_final is None else grad_final.double()}
    exact = reference(double(inputs), **wide)
    on_device = to({**inputs, "grad_out": grad_out, "grad_final": grad_final}, device)
    call = {k: v for k, v in on_device.items() if k in inputs}, on_device["grad_out"], on_device["grad_final"]
    rounded = reference(*call)
    if actual is None:
        actual = run(*call)
    assert actual.keys() == exact.keys()
    for name, grad in actual.items():
        assert grad.dtype == inputs[name].dtype
        assert_within_twice(grad, rounded[name], exact[name], **APPROXIMATIONS[grad.device.type])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 8, 16, 24])
def test_matches_float64(any_device: torch.device, n: int, dtype: torch.dtype) -> None:
    """Empty sequences, single tokens, and lengths on both sides of the distance between saved states."""
    lengths = [19, 0, 1, 16, 0, 70] if n == 16 else [5, 18, 0]
    inputs = make(37, n, lengths, dtype, seed=n)
    inputs["initial_states"] = randn(len(lengths), 37, n, seed=n)
    check(inputs, any_device, randn(len(lengths), 37, n, seed=n + 1))


def test_largest_state(any_device: torch.device) -> None:
    check(make(5, 256, [5, 17], seed=3), any_device)


@pytest.mark.parametrize("layout", ["channel_major", "strided"])
def test_any_strides(any_device: torch.device, layout: str) -> None:
    check(make(35, 8, [6, 18], layout=layout, seed=5), any_device)


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "delta_softplus"])
def test_optional_arguments(any_device: torch.device, absent: str) -> None:
    inputs = make(30, 4, [18], seed=7)
    if absent == "delta_softplus":
        inputs |= {"delta_softplus": False, "delta": inputs["delta"].abs() * 0.1}
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    else:
        inputs[absent] = None
    check(inputs, any_device)


def test_time_steps_of_a_mixer(any_device: torch.device) -> None:
    """Softplus done before, no bias, B and C float32 halves of one tensor beside bfloat16: the mixer's own call."""
    inputs = make(40, 16, [17, 3], torch.bfloat16, seed=9)
    bc = randn(20, 32, seed=9)
    steps = torch.nn.functional.softplus(inputs["delta"].float() - 2).bfloat16()
    inputs |= {
        "delta": steps,
        "delta_bias": None,
        "delta_softplus": False,
        "B": bc[:, :16].t(),
        "C": bc[:, 16:].t(),
    }
    check(inputs, any_device)


@pytest.mark.parametrize("bias", [6.0, 21.0])
def test_softplus_with_a_large_bias(any_device: torch.device, bias: float) -> None:
    """A tile's empty places must count as no time at all, not as a step of softplus(bias)."""
    inputs = make(33, 4, [3, 21], seed=11)
    inputs |= {"delta_bias": bias + inputs["delta_bias"], "A": inputs["A"] * 0.01}
    check(inputs, any_device, randn(2, 33, 4, seed=1))


FORMS = {"constant": (12, 3), "per_token": (2, 3, 19), "groups": (2, 2, 3, 19), "three": (2, 3, 3, 19)}


@pytest.mark.parametrize(
    ("b_form", "c_form"),
    [
        ("constant", "constant"),
        ("per_token", "per_token"),
        ("groups", "groups"),
        ("constant", "groups"),
        ("three", "groups"),
    ],
)
def test_dense_batch_of_mamba_ssm(any_device: torch.device, b_form: str, c_form: str) -> None:
    """Channel-major, every form of B and C, through mamba_ssm's own signature."""
    shape = (2, 12, 19)
    inputs = {
        "u": randn(*shape, seed=1),
        "delta": randn(*shape, seed=2),
        "A": -randn(12, 3, seed=3).exp(),
        "B": randn(*FORMS[b_form], seed=4),
        "C": randn(*FORMS[c_form], seed=5),
        "D": randn(12, seed=6),
        "z": randn(*shape, seed=7),
        "delta_bias": randn(12, seed=8),
        "delta_softplus": True,
    }
    check(inputs, any_device)
    leaves = {k: v.to(any_device).requires_grad_() for k, v in inputs.items() if k != "delta_softplus"}
    out, last = scan_of_mamba_ssm(**leaves, delta_softplus=True, return_last_state=True)
    grad_out, grad_last = randn(*shape, seed=99), randn(2, 12, 3, seed=98)
    grads = torch.autograd.grad(
        [out, last], list(leaves.values()), [grad_out.to(any_device), grad_last.to(any_device)]
    )
    check(inputs, any_device, grad_last, dict(zip(leaves, grads, strict=True)))


def segments(inputs: dict[str, Any], bounds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and final state of one packed sequence that is scanned from bound to bound, its state carried."""
    outs, state = [], inputs["initial_states"]
    for start, stop in pairwise(bounds):
        piece = {k: v[..., start:stop] if k in BY_TOKEN else v for k, v in inputs.items()}
        piece["query_start_loc"] = torch.tensor([0, stop - start], dtype=torch.int32, device=state.device)
        out, state = selective_scan(**(piece | {"initial_states": state}), return_final_states=True)
        outs.append(out)
    return torch.cat(outs, dim=-1), state


@pytest.mark.parametrize("bounds", [[0, 17, 40], [0, 1, 7, 16, 17, 33, 39, 40]])
def test_segments_give_the_gradients_of_the_whole(any_device: torch.device, bounds: list[int]) -> None:
    """One, two and seven segments: within twice the reference's error each; on float64 equal to rounding."""
    for dtype in (torch.float32, torch.float64):
        inputs = make(9, 4, [40], seed=13)
        inputs["initial_states"] = randn(1, 9, 4, seed=13)
        if dtype == torch.float64:
            inputs = double(inputs)
        grad_final = randn(1, 9, 4, seed=14).to(dtype)
        grad_out = randn(9, 40, seed=99).to(dtype)
        on_device = to(inputs, any_device)
        tensors, rest = split(on_device)
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        results = segments({**leaves, **rest}, bounds)
        upstream = [grad_out.to(any_device), grad_final.to(any_device)]
        cut = dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), upstream), strict=True))
        if dtype == torch.float32:
            check(inputs, any_device, grad_final, cut)
            continue
        whole = run(on_device, *upstream)
        for name, grad in whole.items():
            torch.testing.assert_close(cut[name], grad, rtol=1e-12, atol=1e-12 * grad.abs().max().item())


def test_packed_documents_as_one_at_a_time(any_device: torch.device) -> None:
    """The gradients of a token's inputs to the bit; those of parameters, sums over all documents, to rounding."""
    lengths = [4, 18, 1]
    inputs = make(9, 8, lengths, seed=15)
    grad_out = randn(9, 23, seed=99)
    on_device, upstream = to(inputs, any_device), grad_out.to(any_device)
    packed = run(on_device, upstream)
    summed: dict[str, torch.Tensor] = {}
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        document = {k: v[:, part] if k in BY_TOKEN else v for k, v in on_device.items()}
        document["query_start_loc"] = torch.tensor([0, length], dtype=torch.int32, device=any_device)
        for name, grad in run(document, upstream[:, part]).items():
            if name in BY_TOKEN:
                assert torch.equal(grad, packed[name][:, part]), name
            else:
                summed[name] = summed.get(name, 0) + grad
        start += length
    check(inputs, any_device, None, packed)
    check(inputs, any_device, None, packed | summed)


def test_final_states_alone(any_device: torch.device) -> None:
    """A loss of the final states only."""
    inputs = make(5, 4, [18, 0], seed=17)
    inputs["initial_states"] = randn(2, 5, 4, seed=17)
    grad_final = randn(2, 5, 4, seed=18)
    on_device = to(inputs | {"grad_final": grad_final}, any_device)
    upstream = on_device.pop("grad_final")
    actual = run(on_device, None, upstream)
    exact = reference(double(inputs), None, grad_final.double())
    rounded = reference(on_device, None, upstream)
    for name, grad in actual.items():
        assert_within_twice(grad, rounded[name], exact[name], **APPROXIMATIONS[grad.device.type])


def test_output_has_the_bits_of_inference(any_device: torch.device) -> None:
    inputs = to(make(33, 16, [18, 3], torch.bfloat16, seed=19), any_device)
    with torch.no_grad():
        expected, last = selective_scan_fn(**inputs, return_last_state=True)
        alone = selective_scan(**inputs)
    inputs["u"].requires_grad_()
    for call in (selective_scan, selective_scan_fn):
        extra = {"return_last_state" if call is selective_scan_fn else "return_final_states": True}
        out, final = call(**inputs, **extra)
        assert out.requires_grad
        assert torch.equal(out, expected)
        assert torch.equal(final, last)
    assert torch.equal(alone, expected)


def test_same_bits_in_two_runs(any_device: torch.device) -> None:
    inputs = to(make(40, 16, [35, 5], torch.bfloat16, seed=21), any_device)
    upstream = randn(40, 40, seed=99, dtype=torch.bfloat16).to(any_device)
    first, second = run(inputs, upstream), run(inputs, upstream)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens_of_no_sequence(any_device: torch.device) -> None:
    """Zero in the output and in every gradient, whatever their inputs; and they change nothing elsewhere."""
    inputs = make(6, 4, [2, 17, 3], seed=23)
    for name in BY_TOKEN:
        inputs[name][:, :2] = inputs[name][:, 19:] = float("nan")
    inputs["query_start_loc"] = torch.tensor([2, 19], dtype=torch.int32)
    on_device = to(inputs, any_device)
    upstream = randn(6, 22, seed=99).to(any_device)
    out, grads = selective_scan(**on_device), run(on_device, upstream)
    for x in (out, *(grads[name] for name in BY_TOKEN)):
        assert not x[:, :2].any()
        assert not x[:, 19:].any()
    assert all(grad.isfinite().all() for grad in grads.values())
    on_device["query_start_loc"] = torch.tensor(
        [5], dtype=torch.int32, device=any_device
    )  # no sequence at all
    assert not any(grad.any() for grad in run(on_device, upstream).values())


def test_ungated_output(any_device: torch.device) -> None:
    """y beside the gated output; both take part in the loss."""
    inputs = make(7, 4, [18], seed=25)
    on_device = to(inputs, any_device)
    tensors, rest = split(on_device)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, final, y = selective_scan(**leaves, **rest, return_final_states=True, return_ungated=True)
    exact_y, exact_final = selective_scan_reference(**double(inputs | {"z": None}))
    reference_y, reference_final = selective_scan_reference(**(on_device | {"z": None}))
    assert_within_twice(y.detach(), reference_y, exact_y, approximate=0.25)
    assert_within_twice(final.detach(), reference_final, exact_final, approximate=0.25)
    gate = leaves["z"]
    torch.testing.assert_close(out, y * torch.nn.functional.silu(gate))
    upstream = randn(2, 7, 18, seed=99).to(any_device)
    grads = torch.autograd.grad([out, y], list(leaves.values()), list(upstream))
    of_y = {k: v for k, v in inputs.items() if k != "z"} | {"z": None}
    grad_y = upstream[0] * torch.nn.functional.silu(gate.detach()) + upstream[1]
    expected = reference(double(of_y), grad_y.cpu().double())
    for name, grad in zip(leaves, grads, strict=True):
        if name != "z":
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(grad.cpu().double(), expected[name], rtol=1e-4, atol=1e-5 * scale)
    with_z = dict(zip(leaves, grads, strict=True))["z"]
    slope = torch.autograd.grad(torch.nn.functional.silu(gate).sum(), gate)[0]
    torch.testing.assert_close(with_z, upstream[0] * y.detach() * slope)


def test_gradcheck() -> None:
    inputs = double(make(3, 2, [4, 0, 17], seed=27))
    inputs["initial_states"] = randn(3, 3, 2, seed=27).double()
    tensors, rest = split(inputs)
    leaves = [x.detach().requires_grad_() for x in tensors.values()]

    def scan(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return selective_scan(**dict(zip(tensors, args, strict=True)), **rest, return_final_states=True)

    assert torch.autograd.gradcheck(scan, leaves)


def test_opcheck_and_compile() -> None:
    inputs = make(4, 4, [5, 18], seed=29)
    initial = randn(2, 4, 4, seed=29).requires_grad_()
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = [inputs[name].detach().requires_grad_() for name in order]
    starts = inputs["query_start_loc"]
    grouped = [x[None] if name in "BC" else x for name, x in zip(order, leaves, strict=True)]
    functional = torch.ops.tp_mamba.selective_scan_functional
    for initial_states in (initial, None):
        torch.library.opcheck(functional.default, (*grouped, initial_states, True, starts, 16))
    plain = [x.detach() for x in grouped]
    out, final, saved = functional(*plain, initial.detach(), True, starts, 16)
    arguments = (torch.ones_like(out), torch.ones_like(final), *plain, saved, True, starts, 16, True)
    torch.library.opcheck(torch.ops.tp_mamba.selective_scan_backward.default, arguments)

    def loss(scan: Any) -> torch.Tensor:
        out, final = scan(
            *leaves, True, query_start_loc=starts, initial_states=initial, return_final_states=True
        )
        return out.square().sum() + final.sum()

    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(selective_scan), [*leaves, initial])
    for grad, expected in zip(torch.autograd.grad(loss(compiled), [*leaves, initial]), eager, strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("given", ["ssm_states", "out", "save_states_every"])
def test_no_gradient_is_cut_silently(given: str) -> None:
    inputs = make(4, 2, [6])
    inputs["A"].requires_grad_()
    extra = {"ssm_states": torch.zeros(1, 4, 2), "out": torch.empty(4, 6), "save_states_every": 2}
    with pytest.raises(RuntimeError, match=f"{given} was given and an input requires grad") as refusal:
        selective_scan_fn(**inputs, **{given: extra[given]})
    assert "call selective_scan, which takes initial_states" in str(refusal.value)
    with torch.no_grad():
        selective_scan_fn(**inputs, **{given: extra[given]})


def test_refusals() -> None:
    inputs = make(4, 2, [6, 1])
    for shape in ((1, 4, 2), (2, 4, 3)):
        with pytest.raises(
            ValueError, match=r"^selective_scan: initial_states has shape .* \[S, D, N\] is \[2, 4, 2\]"
        ):
            selective_scan(**inputs, initial_states=torch.zeros(shape))
    with pytest.raises(ValueError, match="initial_states has dtype"):
        selective_scan(**inputs, initial_states=torch.zeros(2, 4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^selective_scan: A has shape"):
        selective_scan(**(inputs | {"A": torch.zeros(5, 2)}))
    inputs["u"].requires_grad_()
    grad = torch.autograd.grad(selective_scan(**inputs).square().sum(), inputs["u"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="a gradient of its gradient"):
        grad.sum().backward()
