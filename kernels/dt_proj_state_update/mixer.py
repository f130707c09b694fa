"""Triton kernel of dt_proj's product, its softplus and the state update of one token, for what a mixer passes.

A program takes eight rows of the batch, or twice eight, and 32 or 64 channels. Its rows of dt_proj's weight are read
before the kernel ahead has ended. Then the states of its first eight rows are on their way while the tensor cores
multiply and the softplus is taken, for all its rows at once; the time steps never leave the multiprocessor. The next
eight rows' states are loaded as the registers of the first eight come free. A thread owns two adjacent channels of a
row with all their states as scalars, as in ``selective_state_update_rows_triton``, so that nothing but the time steps
is exchanged.

Bits are those of ``linear_softplus`` for up to 64 rows, and of ``selective_state_update``, one after the other.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.alignment import in_words
from tp_mamba.kernels.common.approximations import LOG2_E, softplus_of_sum
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.dialect import add, jit_by_type
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2
from tp_mamba.kernels.common.recurrence import token_of_states

STATE_SIZES = (4, 8, 16)
"""Whole loads of four states of B and C; the states of a thread's channels leave room for a second program."""
MOST_RANK = 256
"""Of dt_proj: all of a program's part of the weight is multiplied at once."""
BLOCK_B = 8
"""Rows of the batch: the columns of the tensor core's tile."""
BLOCK_D = 32
"""Channels: of a row and state one line of memory."""
_FEW_ROWS, _MULTIPROCESSORS = 2, 120
"""Of up to two rows most warps have nothing to do: then half as many programs of 64 channels are faster, if there are
still about as many as an H200 has multiprocessors."""
_MANY_OUTPUTS = 2**18
"""Rows times channels from which a program takes two blocks of rows, one after the other: then all programs still run
at once, and each reads its rows of the weight, and A, for twice as many rows. Four blocks spill, and are slower."""
_MOST_PROGRAMS = 65535
"""Along the grid's second axis."""
_PER_THREAD = 2
_REGISTERS = 128
"""A thread's: 16 warps then share a multiprocessor, whose loads on their way are 64 KB of states."""


@triton.jit
def _load_states(rows_ptr, mask, N: tl.constexpr, PER_ROW: tl.constexpr, PER_THREAD: tl.constexpr):
    """B or C of each thread's row, at ``rows_ptr [threads]``: N tensors ``[rows, PER_ROW]`` of one value a row."""
    FOUR: tl.constexpr = rows_ptr.dtype.scalar.element_ty.primitive_bitwidth // 2  # in bytes
    THREADS: tl.constexpr = rows_ptr.shape[0]
    four = tl.arange(0, 4)[None, :]
    states = ()
    for m in tl.static_range(N // 4):
        p = tl.multiple_of((rows_ptr + m * 4)[:, None], [FOUR, FOUR])
        x = tl.load(p + four, mask=mask[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [THREADS, 2, 2]))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        for s in tl.static_range(4):
            x = (s0, s1, s2, s3)[s]
            # What a thread has loaded serves all its channels.
            x = tl.broadcast_to(x[:, None], [THREADS, PER_THREAD])
            states = states + (tl.reshape(x, [THREADS * PER_THREAD // PER_ROW, PER_ROW]),)
    return states


@triton.jit
def _of_other_layout(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x``, as a tile whose layout the compiler does not carry over to what is computed with it.

    The states would else all be moved to the threads that hold the tensor core's result. No layout is carried over a
    scan; one of a single element is no instruction.
    """
    return tl.reshape(tl.associative_scan(tl.reshape(x, [ROWS, COLUMNS, 1]), 2, add), [ROWS, COLUMNS])


@triton.jit
def _blocks_of(x, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The one or two blocks of rows of ``x``."""
    blocks = (x,)
    if BLOCKS == 2:
        blocks = tl.split(tl.permute(tl.reshape(x, [2, ROWS, COLUMNS]), [1, 2, 0]))
    return blocks


@triton.jit
def _rows(ptr, offset, first_d, d, PER_THREAD: tl.constexpr):
    """Pointers ``[rows, channels]``; the launcher has seen that a thread's channels of each row are a whole word."""
    WORD: tl.constexpr = PER_THREAD * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of((ptr + offset + first_d)[:, None], [WORD, WORD]) + d[None, :]


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def dt_proj_state_update_kernel(
    state_ptr,  # [slots, D, N], any float, in and out
    x_ptr,  # [B, D], bfloat16 or float16, in
    dt_ptr,  # [B, R], as x
    weight_ptr,  # [D, R], as x
    z_ptr,  # as x, or None
    out_ptr,  # as x, out
    A_ptr,  # [D, N]
    B_ptr,  # [B, N]
    C_ptr,  # [B, N]
    D_ptr,  # [D] contiguous, or None
    bias_ptr,  # [D] contiguous, or None
    slot_ptr,  # [B] int, or None: slot b for row b
    batch: tl.int32,
    pad_slot_id: tl.int64,  # without slots -1, which is no row's
    state_stride_s: tl.int64,
    x_stride_b: tl.int64, dt_stride_b: tl.int64, z_stride_b: tl.int64, out_stride_b: tl.int64,
    B_stride_b: tl.int64, C_stride_b: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into the loads and stores.
    state_stride_n: tl.constexpr, A_stride_n: tl.constexpr, weight_stride_d: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,  # of rows: 1 or 2
    BLOCK_D: tl.constexpr,  # divides channels
    PER_THREAD: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    first_d = tl.program_id(0).to(tl.int64) * BLOCK_D
    first_row = tl.program_id(1).to(tl.int64) * (BLOCKS * BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)

    weight = tl.load(
        tl.multiple_of(weight_ptr + first_d * weight_stride_d, 16)
        + d[:, None] * weight_stride_d
        + r[None, :],
        mask=(r < R)[None, :],
        other=0.0,
    )
    bias = tl.full([BLOCK_D], 0.0, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_d + d).to(tl.float32)
    skip = tl.full([1, BLOCK_D], 0.0, tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + first_d + d).to(tl.float32)[None, :]
    slots = ()
    for i in tl.static_range(BLOCKS):
        slot = first_row + i * BLOCK_B + tl.arange(0, BLOCK_B)
        if HAS_SLOTS:
            slot = tl.load(slot_ptr + slot, mask=slot < batch, other=0).to(tl.int64)
        slots = slots + (slot,)
    wait_for_kernel_ahead(PDL)

    A_WORD: tl.constexpr = PER_THREAD * A_ptr.dtype.element_ty.primitive_bitwidth // 8
    THREADS: tl.constexpr = BLOCK_B * BLOCK_D // PER_THREAD
    a = ()
    deltas = ()
    for i in tl.static_range(BLOCKS):
        row = first_row + i * BLOCK_B + tl.arange(0, BLOCK_B)
        real, slot = row < batch, slots[i]
        live = (real & (slot != pad_slot_id))[:, None]
        mask = live & (d >= 0)[None, :]
        p_state = _rows(state_ptr, slot * state_stride_s, first_d, d, PER_THREAD)
        h = ()
        for n in tl.static_range(N):
            h = h + (tl.load(p_state + n * state_stride_n, mask=mask, other=0.0).to(tl.float32),)
        x = tl.load(_rows(x_ptr, row * x_stride_b, first_d, d, PER_THREAD), mask=mask, other=0.0)
        z = x
        if HAS_Z:
            z = tl.load(_rows(z_ptr, row * z_stride_b, first_d, d, PER_THREAD), mask=mask, other=0.0)
        if i == 0:
            # All on its way before the first value is used: the time steps' product comes last, behind a barrier.
            p_a = tl.multiple_of(A_ptr + first_d, A_WORD) + d[None, :] + tl.full([BLOCK_B, 1], 0, tl.int32)
            for n in tl.static_range(N):
                a = a + (tl.load(p_a + n * A_stride_n).to(tl.float32) * LOG2_E,)
            all_rows = first_row + tl.arange(0, BLOCKS * BLOCK_B)
            p_dt = tl.multiple_of((dt_ptr + all_rows * dt_stride_b)[:, None], [16, 16]) + r[None, :]
            dt = tl.load(p_dt, mask=(all_rows < batch)[:, None] & (r < R)[None, :], other=0.0)
            product = tl.dot(weight, dt.trans()).trans()
        # B and C come from the L2, under the softplus: sooner, they would cost registers that a second program needs.
        of_thread = first_row + i * BLOCK_B + tl.arange(0, THREADS) // (BLOCK_D // PER_THREAD)
        b = _load_states(B_ptr + of_thread * B_stride_b, of_thread < batch, N, BLOCK_D, PER_THREAD)
        c = _load_states(C_ptr + of_thread * C_stride_b, of_thread < batch, N, BLOCK_D, PER_THREAD)
        if i == 0:
            delta = softplus_of_sum(product, bias).to(dt_ptr.dtype.element_ty)
            deltas = _blocks_of(delta, BLOCKS, BLOCK_B, BLOCK_D)
        delta = _of_other_layout(deltas[i], BLOCK_B, BLOCK_D)
        after, y = token_of_states(h, a, skip, skip, x, delta, z, b, c, N, HAS_D, HAS_Z, False, False)
        p_out = _rows(out_ptr, row * out_stride_b, first_d, d, PER_THREAD)
        tl.store(
            p_out,
            tl.where(mask, y, 0.0).to(out_ptr.dtype.element_ty),
            mask=real[:, None] & (d >= 0)[None, :],
        )
        for n in tl.static_range(N):
            tl.store(p_state + n * state_stride_n, after[n].to(state_ptr.dtype.element_ty), mask=mask)


def serves(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:
    """Whether the kernel takes these arguments; else its two parts run one after the other.

    It wants 16-bit activations of one dtype, whole blocks of 32 channels, N of 4, 8 or 16, R of at most 256, contiguous
    channels of everything (of state and A too) and every row at a whole word: two channels, four states, eight of dt.
    """
    activations = [y for y in (x, dt, weight, z, out) if y is not None]
    if x.dtype not in (torch.bfloat16, torch.float16) or any(y.dtype != x.dtype for y in activations):
        return False
    if A.shape[1] not in STATE_SIZES or dt.shape[1] > MOST_RANK or x.shape[1] % BLOCK_D:
        return False
    if cdiv(len(x), row_blocks(*x.shape) * BLOCK_B) > _MOST_PROGRAMS:
        return False
    by_channel = [y for y in (x, z, out, state.mT, A.t()) if y is not None]
    vectors = [y for y in (bias, D) if y is not None]
    return (
        in_words(_PER_THREAD, *by_channel)
        and in_words(4, B, C)
        and in_words(8, dt, weight)
        and in_words(1, *vectors)
    )


def row_blocks(batch: int, channels: int) -> int:
    """Blocks of eight rows that a program takes. Results do not depend on it."""
    return 2 if batch > BLOCK_B and batch * channels >= _MANY_OUTPUTS else 1


def channels_a_program(batch: int, channels: int) -> int:
    """32, or 64 for very few rows of many channels. Results do not depend on it."""
    wide = 2 * BLOCK_D
    few = batch <= _FEW_ROWS and channels % wide == 0 and channels // wide >= _MULTIPROCESSORS
    return wide if few else BLOCK_D


def launch(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    slots: torch.Tensor | None,
    pad_slot_id: int,
    out: torch.Tensor,
) -> None:
    """Launch the kernel for what :func:`serves`; arguments as the op ``tp_mamba::dt_proj_state_update``."""
    (batch, channels), (R, n) = x.shape, (dt.shape[1], A.shape[1])
    if batch == 0 or channels == 0:
        return
    block_d, blocks = channels_a_program(batch, channels), row_blocks(batch, channels)
    grid = (channels // block_d, cdiv(batch, blocks * BLOCK_B))
    z_stride = 0 if z is None else z.stride(0)
    with torch.cuda.device_of(x):
        dt_proj_state_update_kernel[grid](
            state, x, dt, weight, z, out, A, B, C, D, bias, slots,
            batch, -1 if slots is None else pad_slot_id, state.stride(0),
            x.stride(0), dt.stride(0), z_stride, out.stride(0), B.stride(0), C.stride(0),
            state.stride(2), A.stride(1), weight.stride(0),
            N=n, R=R, BLOCK_R=max(16, next_power_of_2(R)), BLOCK_B=BLOCK_B, BLOCKS=blocks, BLOCK_D=block_d,
            PER_THREAD=_PER_THREAD, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None,
            HAS_SLOTS=slots is not None, num_warps=BLOCK_B * block_d // _PER_THREAD // 32, maxnreg=_REGISTERS,
            enable_fp_fusion=False, **early_start(x.device),
        )  # fmt: skip
