"""Gradients of the causal convolution: against the reference, over borders of sequences, and in segments."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from causal_conv1d_testing import starts_of
from conv_norm_testing import CPU, CUDA, INTERPRETER, run_on
from gradient_testing import assert_as_good_as, cotangent, gradients, tensors
from kernel_testing import to

from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference
from tp_mamba.kernels.compat.causal_conv1d import causal_conv1d_fn as by_number

LENGTHS = (1, 0, 9, 2, 3, 29)
"""Of packed sequences: none, one token, fewer than the window, and no multiple of any tile."""


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    query_start_loc: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """``causal_conv1d_fn`` by the reference; sequences one after another, for autograd cannot follow views of many."""
    if query_start_loc is None:
        pieces = [(b, x[b], torch.tensor([0, x.shape[2]])) for b in range(x.shape[0])]
    else:
        pieces = [(slice(None), x, query_start_loc)]
    outs, states = [], []
    for rows, packed, starts in pieces:
        shape = (len(starts) - 1, weight.shape[0], weight.shape[1] - 1)
        given = None if initial_states is None else initial_states[rows].reshape(shape)
        state = x.new_zeros(shape) if given is None else given.to(x.dtype).clone()
        initial = torch.full((shape[0],), given is not None)
        outs.append(
            causal_conv1d_reference(
                packed, weight, bias, activation,
                query_start_loc=starts, conv_states=state, has_initial_state=initial,
            )
        )  # fmt: skip
        states.append(state)
    out = outs[0] if query_start_loc is not None else torch.stack(outs)
    return (out, torch.cat(states)) if return_final_states else out


def make(
    shape: tuple[int, ...],
    K: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    lengths: tuple[int, ...] = (),
    layout: str = "token_major",
    bias: bool = True,
    initial: bool = True,
) -> dict[str, Any]:
    """Arguments of ``causal_conv1d_fn``; shape is ``[B, D, L]``, or ``[D]`` with the lengths of packed sequences."""
    generator = torch.Generator().manual_seed(sum(shape) + K)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    sequences, D = (len(lengths), shape[0]) if lengths else shape[:2]
    size = (D, sum(lengths) + 5) if lengths else shape
    if layout == "token_major":  # the x half of in_proj's output
        x = randn(*size[:-2], size[-1], 2 * D)[..., :D].transpose(-1, -2)
    elif layout == "gaps":  # nothing contiguous
        x = randn(*size[:-2], D, 2 * size[-1])[..., ::2]
    else:
        x = randn(*size)
    inputs: dict[str, Any] = {"x": x, "weight": randn(D, K)}
    if bias:
        inputs["bias"] = randn(D)
    if initial:
        inputs["initial_states"] = randn(sequences, D, K - 1)
    if lengths:  # two tokens before the first sequence and three after the last belong to none
        inputs["query_start_loc"] = starts_of(lengths, "cpu") + 2
    return inputs


CASES = [
    ({"shape": (1, 8, 67)}, {}),  # two runs of a program
    ({"shape": (2, 12, 70), "K": 3, "layout": "channel_major", "initial": False}, {"activation": None}),
    ({"shape": (1, 40, 1), "K": 2}, {}),
    ({"shape": (3, 8, 2), "layout": "channel_major"}, {}),
    ({"shape": (3, 8, 2), "bias": False}, {"return_final_states": False}),
    ({"shape": (12,), "lengths": (1, 0, 6, 2)}, {}),
    ({"shape": (12,), "lengths": (1, 5), "K": 2, "initial": False}, {"return_final_states": False}),
    ({"shape": (20,), "lengths": LENGTHS, "K": 3, "layout": "gaps", "bias": False}, {"activation": None}),
    ({"shape": (36,), "lengths": (1,) * 5, "layout": "channel_major"}, {}),
]
LARGE_CASES = [
    ({"shape": (20,), "lengths": LENGTHS}, {}),
    ({"shape": (520,), "lengths": (3, 6)}, {}),
    ({"shape": (2, 1030, 100), "bias": False}, {}),
]


EVERYWHERE = pytest.mark.parametrize("where", [CPU, INTERPRETER, CUDA])


def check_errors(device: str, sizes: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {"activation": "silu", "return_final_states": True} | options

    def of(function: Any) -> Any:
        return lambda **inputs: function(**inputs, **options)

    inputs = to(make(**sizes, dtype=dtype), torch.device(device))
    assert_as_good_as(of(causal_conv1d_fn), of(reference), inputs)


@pytest.mark.parametrize("where", [CPU, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "options"), [*CASES, *LARGE_CASES], ids=str)
def test_errs_no_more_than_twice_the_reference(
    sizes: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, where: str
) -> None:
    run_on(where, check_errors, sizes, options, dtype)


@pytest.mark.parametrize(("sizes", "options"), CASES, ids=str)
def test_interpreted_kernels_err_no_more_than_twice_the_reference(
    sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    run_on("interpreter", check_errors, sizes, options, torch.bfloat16)


def check_wide_weights(device: str) -> None:
    inputs = make((24,), lengths=(1, 0, 6), dtype=torch.bfloat16)
    inputs |= {name: inputs[name].float() for name in ("weight", "bias", "initial_states")}
    names = tensors(inputs)
    found = gradients(causal_conv1d_fn, to(inputs, torch.device(device)), names)
    exact = gradients(reference, {n: x.double() if n in names else x for n, x in inputs.items()}, names)
    for name in names:
        eps = torch.finfo(inputs[name].dtype).eps
        size = exact[name].abs().max().item()
        assert (found[name].cpu().double() - exact[name]).abs().max() <= 4 * eps * size, name


@EVERYWHERE
def test_wide_weights_and_states_of_16_bit_inputs(where: str) -> None:
    run_on(where, check_wide_weights)


@torch.enable_grad()
def check_forward(device: str) -> None:
    for sizes in ({"shape": (2, 24, 9)}, {"shape": (24,), "lengths": (1, 5), "layout": "channel_major"}):
        inputs = to(make(**sizes, dtype=torch.bfloat16), torch.device(device))
        expected = causal_conv1d_fn(**inputs, activation="silu", return_final_states=True)
        inputs["x"] = inputs["x"].detach().requires_grad_()
        tracked = causal_conv1d_fn(**inputs, activation="silu", return_final_states=True)
        for each, plain in zip(tracked, expected, strict=True):
            assert each.requires_grad
            assert torch.equal(each, plain)
            assert each.stride() == plain.stride()


@EVERYWHERE
def test_the_forward_has_the_bits_of_inference(where: str) -> None:
    run_on(where, check_forward)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("lengths", [(), (1, 0, 2, 5)], ids=str)
def test_gradcheck(lengths: tuple[int, ...], K: int, activation: str | None) -> None:
    for length in (1, 2, 5):
        shape = (3,) if lengths else (2, 3, length)
        inputs = make(shape, K, torch.float64, lengths=lengths)
        names = tensors(inputs)

        def call(*given: torch.Tensor, inputs: Any = inputs, names: Any = names) -> Any:
            arguments = inputs | dict(zip(names, given, strict=True))
            return causal_conv1d_fn(**arguments, activation=activation, return_final_states=True)

        assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("pieces", [2, 7])
def test_a_sequence_in_segments(pieces: int) -> None:
    """The state carried from each segment to the next: gradients are those of the whole sequence."""
    inputs = make((2, 6, 23), dtype=torch.float64)

    def in_segments(x: torch.Tensor, initial_states: torch.Tensor, **rest: Any) -> tuple[torch.Tensor, ...]:
        outs, state = [], initial_states
        for piece in x.tensor_split(pieces, dim=2):
            out, state = causal_conv1d_fn(
                piece, initial_states=state, return_final_states=True, activation="silu", **rest
            )
            outs.append(out)
        return torch.cat(outs, 2), state

    def whole(**inputs: Any) -> Any:
        return causal_conv1d_fn(**inputs, return_final_states=True, activation="silu")

    names = tensors(inputs)
    expected, found = gradients(whole, inputs, names), gradients(in_segments, inputs, names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@torch.enable_grad()
def check_packed(device: str) -> None:
    inputs = to(make((20,), lengths=(1, 0, 9, 2), dtype=torch.bfloat16), torch.device(device))
    starts = inputs["query_start_loc"].tolist()
    inputs["x"][:, : starts[0]] = inputs["x"][:, starts[-1] :] = float("inf")

    def call(**inputs: Any) -> Any:
        return causal_conv1d_fn(**inputs, activation="silu", return_final_states=True)

    leaves = {name: inputs[name].detach().requires_grad_() for name in tensors(inputs)}
    out, state = call(**(inputs | leaves))
    dout, dstate = cotangent(out), cotangent(state, 1)
    packed = torch.autograd.grad((out, state), [leaves["x"], leaves["initial_states"]], (dout, dstate))
    assert (packed[0][:, : starts[0]] == 0).all()
    assert (packed[0][:, starts[-1] :] == 0).all()
    for s, (start, stop) in enumerate(pairwise(starts)):
        x = inputs["x"][:, start:stop].detach()[None].requires_grad_()
        initial = inputs["initial_states"][s : s + 1].detach().requires_grad_()
        outs = call(x=x, weight=inputs["weight"], bias=inputs["bias"], initial_states=initial)
        alone = torch.autograd.grad(outs, [x, initial], (dout[None, :, start:stop], dstate[s : s + 1]))
        torch.testing.assert_close(packed[0][:, start:stop], alone[0][0], rtol=0, atol=0)
        torch.testing.assert_close(packed[1][s], alone[1][0], rtol=0, atol=0)


@EVERYWHERE
def test_packed_is_one_at_a_time(where: str) -> None:
    """Bit for bit in dx and the states' gradients: nothing leaks over a border, whatever lies beyond it."""
    run_on(where, check_packed)


@torch.enable_grad()
def check_one_result(device: str) -> None:
    inputs = to(make((2, 8, 5)), torch.device(device))
    for used in (0, 1):
        x = inputs["x"].detach().requires_grad_()
        outs = causal_conv1d_fn(x, inputs["weight"], return_final_states=True, activation="silu")
        outs[used].sum().backward()
        exact = x.detach().double().cpu().requires_grad_()
        outs = reference(exact, inputs["weight"].double().cpu(), None, "silu", return_final_states=True)
        outs[used].sum().backward()
        torch.testing.assert_close(x.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-5)


@EVERYWHERE
def test_only_one_result_is_used(where: str) -> None:
    run_on(where, check_one_result)


def test_final_states_are_written_where_asked() -> None:
    x, weight = torch.randn(2, 8, 5, requires_grad=True), torch.randn(8, 4)
    into = torch.zeros(2, 8, 3)
    _, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=into)
    assert final is into
    assert torch.equal(into, x[..., 2:])
    (gradient,) = torch.autograd.grad(final.sum(), x)
    assert torch.equal(gradient, torch.tensor([0.0, 0, 1, 1, 1]).expand_as(x))


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed = make((6,), lengths=(1, 4), dtype=dtype)
        dense = make((2, 6, 5), dtype=dtype, bias=False, initial=False)
        for inputs, final in ((packed, True), (dense, False)):
            inputs |= {name: inputs[name].requires_grad_() for name in tensors(inputs)}
            arguments = [inputs.get(n) for n in ("x", "weight", "bias", "initial_states", "query_start_loc")]
            arguments.insert(3, True)
            forward = torch.ops.tp_mamba.causal_conv1d_functional.default
            torch.library.opcheck(forward, (*arguments, final))
            out, states = forward(*arguments, final)
            plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            given = (torch.randn_like(out), torch.randn_like(states) if final else None)
            torch.library.opcheck(torch.ops.tp_mamba.causal_conv1d_backward.default, (*given, *plain))


def test_compiles_with_its_backward() -> None:
    inputs = make((6,), lengths=(1, 4))
    names = tensors(inputs)

    def call(**inputs: Any) -> Any:
        return causal_conv1d_fn(**inputs, activation="silu", return_final_states=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, found = gradients(call, inputs, names), gradients(compiled, inputs, names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name])


def test_what_is_written_in_place_is_refused() -> None:
    x, weight = torch.zeros(2, 6, 9, requires_grad=True), torch.zeros(6, 4)
    for arguments in ({"out": torch.zeros(2, 6, 9)}, {"conv_states": torch.zeros(2, 6, 3)}):
        (name,) = arguments
        with pytest.raises(
            RuntimeError, match=f"causal_conv1d_fn: {name} is written in place, which autograd"
        ):
            causal_conv1d_fn(x, weight, **arguments)
        with torch.no_grad():
            assert not causal_conv1d_fn(x, weight, **arguments).requires_grad
    with pytest.raises(
        RuntimeError, match="causal_conv1d_update: x requires grad but this op has no backward"
    ):
        causal_conv1d_update(x[..., 0], torch.zeros(2, 6, 3), weight)


def test_no_second_derivative() -> None:
    x, weight = torch.randn(1, 6, 9, requires_grad=True), torch.randn(6, 4)
    (dx,) = torch.autograd.grad(causal_conv1d_fn(x, weight, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d_backward: second derivatives are not available"):
        torch.autograd.grad(dx.sum(), x)


@torch.enable_grad()
def check_seq_idx(device: str) -> None:
    """Sequences of a dense batch by number, padding with -1: values and gradients of each sequence on its own."""
    numbers = torch.tensor([[3, 3, 3, 4, 4, -1, -1], [0, 1, 1, 1, 1, 1, 1]], dtype=torch.int32, device=device)
    for layout in ("token_major", "channel_major"):
        inputs = to(make((2, 8, 7), layout=layout, initial=False), torch.device(device))
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = by_number(**leaves, seq_idx=numbers, activation="silu")
        parts = [(0, 0, 3), (0, 3, 5), (1, 0, 1), (1, 1, 7)]
        expected = torch.zeros_like(out)
        for b, start, stop in parts:
            part = {**leaves, "x": leaves["x"][b : b + 1, :, start:stop]}
            expected[b, :, start:stop] = causal_conv1d_fn(**part, activation="silu")[0]
        torch.testing.assert_close(out, expected)
        dout = cotangent(out)
        found, right = (torch.autograd.grad(y, list(leaves.values()), dout) for y in (out, expected))
        for name, actual, exact in zip(leaves, found, right, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5, msg=name)


@EVERYWHERE
def test_seq_idx(where: str) -> None:
    run_on(where, check_seq_idx)


def test_seq_idx_of_wrong_shape_or_with_states_is_refused() -> None:
    x, weight, numbers = torch.zeros(2, 6, 9), torch.zeros(6, 4), torch.zeros(2, 9, dtype=torch.int32)
    for arguments, message in (
        ({"seq_idx": numbers[:1]}, r"seq_idx has shape \[1, 9\] but \[B, L\] is \[2, 9\] here"),
        ({"seq_idx": numbers.float()}, "seq_idx has dtype torch.float32 but must be int32 or int64"),
        ({"seq_idx": numbers, "return_final_states": True}, "seq_idx does not go with states: pack"),
        ({"seq_idx": numbers, "conv_states": torch.zeros(2, 6, 3)}, "does not go with conv_states: pack"),
    ):
        with pytest.raises(ValueError, match=message):
            by_number(x, weight, **arguments)
