"""Cross-entropy from hidden states: chunks of tokens, dtypes, and labels that do not count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tp_mamba.layers.cross_entropy import linear_cross_entropy
from tp_mamba.parallel.group import TensorParallel

ONE = TensorParallel(device="cpu")
T, H, V = 13, 5, 17


def _inputs(
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, weight, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((T, H), (V, H), (T,))
    )
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[[1, 5]] = -100
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, g.to(dtype)


@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 100])
def test_against_torch(chunk: int | None) -> None:
    h, weight, labels, g = _inputs()
    losses = linear_cross_entropy(h, weight, labels, ONE, vocab_size=V, chunk=chunk)
    losses.backward(g)
    found = losses.detach(), h.grad, weight.grad
    h, weight, labels, g = _inputs()
    losses = F.cross_entropy(h @ weight.t(), labels, reduction="none")
    losses.backward(g)
    for ours, theirs in zip(found, (losses.detach(), h.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    h, weight, labels, _ = _inputs()
    assert torch.autograd.gradcheck(
        lambda h, weight: linear_cross_entropy(h, weight, labels, ONE, vocab_size=V, chunk=5), (h, weight)
    )


def test_large_logits_and_padding() -> None:
    """Logits beyond the range of exp, and rows of padding that would win."""
    h, weight, labels, _ = _inputs()
    h, weight = h.detach() * 1e3, weight.detach()
    padded = torch.cat([weight, weight.new_full((3, H), 1e3)]).requires_grad_()
    losses = linear_cross_entropy(h, padded, labels, ONE, vocab_size=V)
    torch.testing.assert_close(losses, F.cross_entropy(h @ weight.t(), labels, reduction="none"))
    losses.sum().backward()
    assert padded.grad[:V].any()
    assert not padded.grad[V:].any()


def test_bfloat16_is_summed_in_float32() -> None:
    """The losses of bf16 operands are exact to float32; the gradients round once, on their way out."""
    h, weight, labels, g = _inputs(torch.bfloat16)
    losses = linear_cross_entropy(h, weight, labels, ONE, vocab_size=V, chunk=4)
    losses.backward(g.float())
    wide, wide_weight = h.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.cross_entropy(wide @ wide_weight.t(), labels, reduction="none")
    expected.backward(g.double())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    for found, exact in ((h.grad, wide.grad), (weight.grad, wide_weight.grad)):
        # The gradients of the logits are rounded to bf16 for their product, then the result.
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-7 * float(exact.abs().max()))


def test_the_gradient_of_a_float32_weight_is_not_rounded() -> None:
    h, weight, labels, g = _inputs(torch.float32)
    h16 = h.detach().bfloat16().requires_grad_()
    losses = linear_cross_entropy(h16, weight, labels, ONE, vocab_size=V)
    losses.backward(g)
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_a_label_outside_the_vocabulary_is_seen() -> None:
    h, weight, labels, _ = _inputs()
    labels[[0, 2]] = torch.tensor([V, -1])
    losses = linear_cross_entropy(h, weight, labels, ONE, vocab_size=V)
    assert losses.isnan().nonzero().flatten().tolist() == [0, 2]
