"""Between tiles of tokens and the recurrence, whose states are tensors of their own: how both scans change layout."""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

import triton
import triton.language as tl

from tp_mamba.kernels.common.dialect import add


@triton.jit
def unstack(x, COUNT: tl.constexpr):
    """``[M, COUNT]`` -> COUNT tensors ``[M]``."""
    # Cut from the last bit of the index up: the first cut asks for the whole tile's new layout, the rest are free.
    if COUNT == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:  # noqa: RET505 - Triton compiles one branch
        even, odd = tl.split(tl.reshape(x, [x.shape[0], COUNT // 2, 2]))
        even = unstack(even, COUNT // 2)
        odd = unstack(odd, COUNT // 2)
        both = ()
        for i in tl.static_range(COUNT // 2):
            both = both + (even[i], odd[i])
        return both


@triton.jit
def stack(rows, COUNT: tl.constexpr):
    """COUNT tensors ``[M]`` -> ``[M, COUNT]``."""
    if COUNT == 1:
        return tl.reshape(rows[0], [rows[0].shape[0], 1])
    else:  # noqa: RET505 - Triton compiles one branch
        even = ()
        odd = ()
        for i in tl.static_range(COUNT // 2):
            even = even + (rows[2 * i],)
            odd = odd + (rows[2 * i + 1],)
        x = tl.join(stack(even, COUNT // 2), stack(odd, COUNT // 2))
        return tl.reshape(x, [x.shape[0], COUNT])


@triton.jit
def computed_once(x, STEPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """``x [STEPS, BLOCK_D]``, which the compiler is kept from computing anew in the layout that it is needed in.

    There every channel's threads would all compute all tokens. No layout is carried back over a scan; one of a single
    element is no instruction.
    """
    return tl.reshape(tl.associative_scan(tl.reshape(x, [STEPS, BLOCK_D, 1]), 2, add), [STEPS, BLOCK_D])


@triton.jit
def by_state(x, STEPS: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    """A tile of B or C ``[STEPS, N]`` -> tensors ``[LANES]``; that of a lane's state i and token s is i * STEPS + s."""
    x = tl.permute(tl.reshape(x.to(tl.float32), [STEPS, PER_LANE // 4, LANES, 4]), [2, 1, 3, 0])
    return unstack(tl.reshape(x, [LANES, PER_LANE * STEPS]), PER_LANE * STEPS)


@triton.jit
def of_token(by_state, s: tl.constexpr, STEPS: tl.constexpr, PER_LANE: tl.constexpr):
    """Token s's B or C of what ``by_state`` gave: PER_LANE tensors ``[LANES, 1]``."""
    states = ()
    for i in tl.static_range(PER_LANE):
        states = states + (by_state[i * STEPS + s][:, None],)
    return states


@triton.jit
def zero_tokens(ptr, stride_t, from_token, to_token, mask):
    """Zeros at ``ptr``, a tile of one token, for a range of tokens."""
    for t in range(from_token, to_token):
        tl.store(ptr + t * stride_t, tl.full(mask.shape, 0.0, ptr.dtype.element_ty), mask=mask)
