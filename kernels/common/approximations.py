"""The GPU's own exponential, logarithm and reciprocal, and the two activations of Mamba-1 made of them.

``tl.exp2`` is four instructions (two bring subnormal results out), ``tl.log2`` and ``/`` are sequences of eight and
more. The scan is bound by how many instructions it issues, so each of these is the one instruction of the
special-function unit: errors of at most 2 ulp, subnormal arguments and results taken as zero. A decay or a gate
below 1e-38 is zero to every sum that it enters.

Triton's interpreter knows no inline assembly: there, plain ``tl`` mathematics stands in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

if knobs.runtime.interpret:

    @triton.jit
    def ex2(x):
        """``2**x``, float32."""
        return tl.exp2(x)

    @triton.jit
    def rcp(x):
        """``1 / x``, float32."""
        return 1.0 / x

else:

    @triton.jit
    def ex2(x):
        """``2**x``, float32."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def rcp(x):
        """``1 / x``, float32."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``, float32."""
    # Far below zero the exponential is held at 2**126, whose reciprocal is the last not to be taken as zero.
    return rcp(1.0 + ex2(tl.minimum(x * -LOG2_E, 126.0)))


@triton.jit
def silu(x):
    """``x / (1 + exp(-x))``, float32."""
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    """The derivative of :func:`silu`."""
    s = sigmoid(x)
    return s * tl.fma(x, 1.0 - s, 1.0)


@triton.jit
def _exp_of_minus_abs(x):
    """``exp(-|x|)``, float32, to 2 ulp."""
    # No smaller result than exp(-87), which changes no state; infinity would be NaN.
    a = tl.minimum(tl.abs(x), 87.0)
    p = a * -LOG2_E
    e = ex2(p)
    # The rounding of p is many ulp of a small e: put right to first order.
    return tl.fma(e, tl.fma(a, -LOG2_E, -p) * LN_2, e)


@triton.jit
def softplus_slope(x):
    """The derivative of :func:`softplus`, ``1 / (1 + exp(-x))``, to a few ulp over the whole range."""
    e = _exp_of_minus_abs(x)
    return tl.where(x >= 0.0, 1.0, e) * rcp(1.0 + e)


@triton.jit
def softplus(x):
    """``log1p(exp(x))``, float32, to a few ulp over the whole range.

    As ``max(x, 0) + log1p(e)`` with ``e = exp(-|x|)`` at most 1. (Above 20 the second term is below half an ulp of
    the first, so this is also the passthrough of ``torch.nn.functional.softplus``.) NaN stays NaN.
    """
    e = _exp_of_minus_abs(x)
    # log1p(e) = 2 atanh(s) = s * P(s * s), s <= 1/3; P is a minimax fit, its relative error 4e-9.
    s = e * rcp(2.0 + e)
    t = s * s
    q = tl.fma(t, 0.28157779574394226, 0.27965158224105835)
    q = tl.fma(t, q, 0.4002459645271301)
    q = tl.fma(t, q, 0.6666632294654846)
    q = tl.fma(t, q, 2.0)
    return tl.fma(s, q, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def softplus_of_sum(product, bias):
    """``softplus(product + bias)`` of a product ``[BLOCK_T, BLOCK_D]`` and a bias ``[BLOCK_D]``, float32."""
    # From a plain sum the compiler would make a product that starts at the bias, with every partial sum rounded to
    # the bias' last place instead of one.
    return softplus(tl.fma(product, 1.0, bias[None, :]))
