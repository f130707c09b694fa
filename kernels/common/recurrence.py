"""One token of the recurrence, in the two forms that the scan and the one-step updates share.

:func:`ssm_token` holds the states of 32 channels as one tile ``[BLOCK_N, BLOCK_D]``; :func:`token_of_states` holds each
state of a thread as a tensor of its own.

Both give the same bits. Kernels that use them are compiled without contraction of ``a * b + c``
(``enable_fp_fusion=False``): a product is fused into a sum exactly where ``fma`` is written. The sum over states is
written out, not left to a layout: four states after each other, then the upper half of those sums added to the lower
until one is left. (Padded states have A = B = C = 0: their state stays zero and adds nothing.)
"""

# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import ex2, silu, softplus


@triton.jit
def _split_in_four(x, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK_N, BLOCK_D]`` -> four ``[BLOCK_N / 4, BLOCK_D]``, of the states j = 0..3 of every four."""
    fours = tl.permute(tl.reshape(x, [BLOCK_N // 4, 2, 2, BLOCK_D]), [0, 3, 1, 2])
    even, odd = tl.split(fours)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def sum_over_states(h, c, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """``sum_n h[n] * c[n]``, ``[BLOCK_N, BLOCK_D] -> [BLOCK_D]``, in the order above."""
    h0, h1, h2, h3 = _split_in_four(h, BLOCK_N, BLOCK_D)
    c0, c1, c2, c3 = _split_in_four(c, BLOCK_N, BLOCK_D)
    y = tl.fma(h3, c3, tl.fma(h2, c2, tl.fma(h1, c1, h0 * c0)))
    for i in tl.static_range(6):  # N <= 256
        if (BLOCK_N >> (i + 2)) > 1:
            halves = tl.permute(tl.reshape(y, [2, BLOCK_N >> (i + 3), BLOCK_D]), [1, 2, 0])
            lower, upper = tl.split(halves)
            y = lower + upper
    return tl.reshape(y, [BLOCK_D])


@triton.jit
def ssm_token(
    h,  # [BLOCK_N, BLOCK_D] float32, the state before this token
    a,  # [BLOCK_N, BLOCK_D] float32, A * log2(e)
    skip,  # [BLOCK_D] float32, D
    bias,  # [BLOCK_D] float32, delta_bias
    u,  # [BLOCK_D]
    delta,  # [BLOCK_D]
    z,  # [BLOCK_D]
    b,  # [BLOCK_N, 1] or [BLOCK_N, BLOCK_D]
    c,  # as b
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """One step of the recurrence for one token: ``(state after it, gated output [BLOCK_D] float32)``."""
    u = u.to(tl.float32)
    delta = delta.to(tl.float32)
    if HAS_BIAS:
        delta = delta + bias
    if SOFTPLUS:
        delta = softplus(delta)
    h = tl.fma(ex2(a * delta[None, :]), h, b.to(tl.float32) * (delta * u)[None, :])
    c = tl.broadcast_to(c.to(tl.float32), [BLOCK_N, BLOCK_D])
    y = sum_over_states(h, c, BLOCK_N, BLOCK_D)
    if HAS_D:
        y = tl.fma(u, skip, y)
    if HAS_Z:
        y = y * silu(z.to(tl.float32))
    return h, y


@triton.jit
def recur(h, a, delta, du, b, c, STATES: tl.constexpr):
    """One step of the recurrence where a thread's states are tensors of their own, not rows of a tile.

    ``h``, ``a``, ``b`` and ``c`` are tuples of STATES tensors: the state before this token, A * log2(e), B and C.
    ``delta`` is the finished step, ``du`` that times u. Gives ``(states after it, sum over them of state * C)``, the
    sum in the order told above.
    """
    after = ()
    chains = ()
    y = du
    for i in tl.static_range(STATES):
        s = tl.fma(ex2(a[i] * delta), h[i], b[i] * du)
        after = after + (s,)  # noqa: RUF005 - Triton has no unpacking
        y = s * c[i] if i % 4 == 0 else tl.fma(s, c[i], y)
        if i % 4 == 3:
            chains = chains + (y,)  # noqa: RUF005
    for _k in tl.static_range(3):
        if len(chains) > 1:
            halved = ()
            for m in tl.static_range(len(chains) // 2):
                halved = halved + (chains[m] + chains[m + len(chains) // 2],)  # noqa: RUF005
            chains = halved
    return after, chains[0]


@triton.jit
def token_of_states(
    h, a, skip, bias, u, delta, z, b, c,
    N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """:func:`ssm_token` in the form of :func:`recur`: ``(N states after it, gated output float32)``."""
    u = u.to(tl.float32)
    delta = delta.to(tl.float32)
    if HAS_BIAS:
        delta = delta + bias
    if SOFTPLUS:
        delta = softplus(delta)
    h, y = recur(h, a, delta, delta * u, b, c, N)
    if HAS_D:
        y = tl.fma(u, skip, y)
    if HAS_Z:
        y = y * silu(z.to(tl.float32))
    return h, y
