"""Gradients of an operator beside those of its reference, in float64 and in its own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_testing import assert_within_twice, double

Inputs = dict[str, Any]
Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def cotangent(out: torch.Tensor, index: int = 0) -> torch.Tensor:
    """What an output's gradient is in these tests: the same values in every dtype, and by no device's generator."""
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(index + out.numel()))
    return values.bfloat16().to(out)


def gradients(function: Function, inputs: Inputs, names: list[str]) -> dict[str, torch.Tensor]:
    """The gradients of ``names`` for :func:`cotangent` at every output, with inputs laid out as they are given."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        outs = function(**{**inputs, **leaves})
        outs = outs if isinstance(outs, tuple) else (outs,)
        found = torch.autograd.grad(
            outs, list(leaves.values()), [cotangent(o, i) for i, o in enumerate(outs)]
        )
    for name, gradient in zip(names, found, strict=True):
        assert gradient.dtype == inputs[name].dtype, name
        assert gradient.shape == inputs[name].shape, name
    return dict(zip(names, found, strict=True))


def tensors(inputs: Inputs) -> list[str]:
    """The names of the floating tensors among ``inputs``."""
    return [name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def assert_as_good_as(
    function: Function, reference: Function, inputs: Inputs, names: list[str] | None = None
) -> None:
    """Every gradient errs at most twice as much as the reference's own, computed in the dtype of its input."""
    names = tensors(inputs) if names is None else names
    here = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    actual = gradients(function, inputs, names)
    exact = gradients(reference, double(here), names)
    in_dtype = gradients(reference, here, names)
    for name in names:
        # Four float32 ulp for the GPU's own exponential and reciprocal, whose errors no long sum averages out.
        assert_within_twice(actual[name], in_dtype[name], exact[name], approximate=4.0)
