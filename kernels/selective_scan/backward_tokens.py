"""The recurrence of the scan's backward, a token at a time, and its sums over states and channels.

As in ``tiles.py`` a thread's states are tensors of their own. ``a`` is A * log2(e) throughout.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import ex2
from tp_mamba.kernels.common.dialect import tree_of
from tp_mamba.kernels.common.fours import load_four
from tp_mamba.kernels.selective_scan.tiles import stack, unstack


@triton.jit
def states_of(ptr, row, stride: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    """B or C of the thread's states in a row; ``ptr [LANES, BLOCK_D]`` points to the first of them in row 0."""
    values = ()
    for i in tl.static_range(PER_LANE // 4):
        values = values + load_four(ptr + (row * stride + 4 * LANES * i))
    return values


@triton.jit
def over_lanes(rows, STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """STEPS tensors ``[LANES, BLOCK_D]`` -> their sums over lanes as a tile ``[STEPS, BLOCK_D]``."""
    flat = ()
    for s in tl.static_range(STEPS):
        flat = flat + (tl.reshape(rows[s], [LANES * BLOCK_D]),)
    x = tl.permute(tl.reshape(stack(flat, STEPS), [LANES, BLOCK_D, STEPS]), [2, 1, 0])
    x = unstack(tl.reshape(x, [STEPS * BLOCK_D, LANES]), LANES)
    return tl.reshape(tree_of(x, 0, LANES), [STEPS, BLOCK_D])


@triton.jit
def over_channels(rows, COUNT: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """COUNT tensors ``[LANES, BLOCK_D]`` -> their sums over channels ``[LANES * COUNT]``."""
    flat = ()
    for v in tl.static_range(COUNT):
        flat = flat + (tl.reshape(rows[v], [LANES * BLOCK_D]),)
    x = tl.permute(tl.reshape(stack(flat, COUNT), [LANES, BLOCK_D, COUNT]), [0, 2, 1])
    return tree_of(unstack(tl.reshape(x, [LANES * COUNT, BLOCK_D]), BLOCK_D), 0, BLOCK_D)


@triton.jit
def state_forward(h, a, b, delta, du, PER_LANE: tl.constexpr):
    """The states after a token, as ``common/recurrence.py`` has them."""
    after = ()
    for i in tl.static_range(PER_LANE):
        after = after + (tl.fma(ex2(a[i] * delta), h[i], b[i] * du),)
    return after


@triton.jit
def token_forward(states, decays, a, b, delta, du, PER_LANE: tl.constexpr):
    """A token, with the arithmetic of ``common/recurrence.py``: ``states`` and ``decays`` with its own."""
    after = ()
    for i in tl.static_range(PER_LANE):
        decay = ex2(a[i] * delta)
        after = after + (tl.fma(decay, states[len(states) - PER_LANE + i], b[i] * du),)
        decays = decays + (decay,)
    return states + after, decays


@triton.jit
def token_back(carry, dA, a, states, decays, b, c, delta, du, g, s: tl.constexpr, PER_LANE: tl.constexpr):
    """Token s of a group: ``(carry, dA, lam * dt * u, state * g, sum_n lam * B, sum_n e * a, sum_n state * C)``."""
    of_b = ()
    of_c = ()
    before = ()
    sums = ()
    dx = delta
    dt = delta
    y = delta
    for i in tl.static_range(PER_LANE):
        h = states[(s + 1) * PER_LANE + i]
        lam = tl.fma(c[i], g, carry[i])  # what the token's state gets
        of_b = of_b + (lam * du,)
        of_c = of_c + (h * g,)
        y = h * c[i] if i == 0 else tl.fma(h, c[i], y)
        dx = lam * b[i] if i == 0 else tl.fma(lam, b[i], dx)
        lam = lam * decays[s * PER_LANE + i]
        e = lam * states[s * PER_LANE + i]
        sums = sums + (tl.fma(e, delta, dA[i]),)
        dt = e * a[i] if i == 0 else tl.fma(e, a[i], dt)
        before = before + (lam,)
    return before, sums, of_b, of_c, dx, dt, y
