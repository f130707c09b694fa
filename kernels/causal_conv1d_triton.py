"""Triton kernel of the causal depthwise convolution: one launch for prefill, packed batches and decode.

The grid holds two kinds of programs, each over a block of channels:

* a *head* program for every sequence: the first ``K - 1`` tokens, which may need the sequence's state, and
  the state itself. It alone touches its slot and reads it whole before it writes, so nothing has to be
  ordered between programs;
* a *body* program for every run of tokens: the tokens at least ``K - 1`` after their sequence's start, which
  need nothing but ``x``. In a packed batch every token finds its start by bisection, on the device, so
  neither the host nor the grid knows any length but the sum.

Both call :func:`_convolve`, so a token's bits do not depend on which kind computed it.
"""

# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _convolve(window, weight, acc, SILU: tl.constexpr):
    """``silu(acc + sum_k window[k] * weight[k])``, oldest tap first; window and weight are K-tuples."""
    for k in tl.static_range(len(weight)):
        acc = tl.fma(window[k], weight[k], acc)
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    return acc


@triton.jit
def _sequence_of(t, starts_ptr, num_seqs, rounds):
    """The last sequence that starts at or before each token: -1 before the first, num_seqs after the last."""
    low = tl.zeros_like(t)
    high = low + (num_seqs + 1)
    for _ in range(rounds):
        middle = (low + high) // 2
        searching = low < high
        before = tl.load(starts_ptr + middle, mask=searching, other=0) <= t
        high = tl.where(searching & ~before, middle, high)
        low = tl.where(searching & before, middle + 1, low)
    return low - 1


@triton.jit
def _head(
    seq, d, m_d, x_ptr, weight, bias, out_ptr, states_ptr, starts_ptr, slots_ptr, initial_ptr,
    length, pad_slot_id, x_stride_t, out_stride_t, states_stride_s, states_stride_d, states_stride_k,
    K: tl.constexpr, HEAD: tl.constexpr, STATE_LEN: tl.constexpr, BLOCK_S: tl.constexpr,
    ALL_INITIAL: tl.constexpr, ZERO_NULL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The first HEAD tokens of a sequence, and its state; x_ptr and out_ptr point at channels of token 0."""
    start = tl.zeros((), tl.int64)
    if starts_ptr is not None:
        start = tl.load(starts_ptr + seq).to(tl.int64)
        length = tl.load(starts_ptr + seq + 1).to(tl.int64) - start
    x_ptr += start * x_stride_t
    out_ptr += start * out_stride_t

    real = length >= 0  # does the sequence have a slot of its own?
    window = ()
    if states_ptr is None:
        for _ in tl.static_range(K - 1):
            window = window + (tl.zeros_like(bias),)
    else:
        slot = seq.to(tl.int64)
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + seq).to(tl.int64)
            real = slot != pad_slot_id
        initial = real & ALL_INITIAL
        if initial_ptr is not None:
            initial = real & (tl.load(initial_ptr + seq) != 0)
        states_ptr += slot * states_stride_s
        for k in tl.static_range(K - 1):
            column = states_ptr + d * states_stride_d + (STATE_LEN - (K - 1) + k) * states_stride_k
            window = window + (tl.load(column, mask=m_d & initial, other=0.0).to(tl.float32),)
        # Column c of the new state is input length - STATE_LEN + c of the sequence, or an old column.
        c = tl.arange(0, BLOCK_S)[None, :]
        p = length - STATE_LEN + c
        m_sd = m_d[:, None] & (c < STATE_LEN) & real & ((length > 0) | ~initial)
        p_old = states_ptr + d[:, None] * states_stride_d + (c + length) * states_stride_k
        b_old = tl.load(p_old, mask=m_sd & (p < 0) & initial, other=0.0)
        b_new = tl.load(x_ptr[:, None] + p * x_stride_t, mask=m_sd & (p >= 0), other=0.0)
        b_state = tl.where(p < 0, b_old, b_new.to(b_old.dtype))

    for t in tl.static_range(HEAD):
        b_x = tl.load(x_ptr + t * x_stride_t, mask=m_d & (t < length), other=0.0)
        window = window + (b_x.to(tl.float32),)
    for t in tl.static_range(HEAD):
        taps = ()
        for k in tl.static_range(K):
            taps = taps + (window[t + k],)
        b_out = _convolve(taps, weight, bias, SILU)
        if ZERO_NULL:
            b_out = tl.where(real, b_out, 0.0)
        tl.store(out_ptr + t * out_stride_t, b_out.to(out_ptr.dtype.element_ty), mask=m_d & (t < length))

    if states_ptr is not None:
        # Threads may exchange columns in the shift: every read of the slot comes before every write.
        tl.debug_barrier()
        p_state = states_ptr + d[:, None] * states_stride_d + c * states_stride_k
        tl.store(p_state, b_state, mask=m_sd)


# Whatever varies from batch to batch compiles no other variant: lengths, counts, strides that follow a
# length, and the alignment of index tensors, which are often slices of longer ones.
@triton.jit(
    do_not_specialize=["length", "num_seqs", "rounds", "num_heads", "runs", "x_stride_d", "out_stride_d"],
    do_not_specialize_on_alignment=["starts_ptr", "slots_ptr", "initial_ptr"],
)
def _causal_conv1d_kernel(
    out_ptr,  # [B, D, L] or [1, D, T], written
    x_ptr,  # like out, read
    weight_ptr,  # [D, K], read
    bias_ptr,  # [D] or None, read
    states_ptr,  # [slots, D, STATE_LEN] or None, read and written
    starts_ptr,  # [S + 1] integers: packed batch; None: dense batch
    slots_ptr,  # [S] integers or None: slot s is sequence s
    initial_ptr,  # [S] bool or None
    D,
    length: tl.int64,  # L, or T of a packed batch
    num_seqs,
    rounds,  # of the bisection: enough for num_seqs + 1 entries
    num_heads,  # head programs for each block of channels
    runs,  # body programs for each block of channels (and sequence of a dense batch)
    pad_slot_id,
    x_stride_b: tl.int64, x_stride_d: tl.int64, x_stride_t: tl.int64,
    out_stride_b: tl.int64, out_stride_d: tl.int64, out_stride_t: tl.int64,
    weight_stride_d, weight_stride_k,
    states_stride_s: tl.int64, states_stride_d: tl.int64, states_stride_k: tl.int64,
    K: tl.constexpr, HEAD: tl.constexpr, STATE_LEN: tl.constexpr, BLOCK_S: tl.constexpr,
    X_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ALL_INITIAL: tl.constexpr, ZERO_NULL: tl.constexpr,
    SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # Blocks of channels vary fastest: neighbouring programs read neighbouring addresses.
    blocks_d = tl.cdiv(D, BLOCK_D)
    i_d = tl.program_id(0) % blocks_d
    i = tl.program_id(0) // blocks_d
    d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = d < D
    # A length-dependent stride (channel-major x) must not be specialised, a unit one must.
    x_ptr += d if X_UNIT else d * x_stride_d
    out_ptr += d if OUT_UNIT else d * out_stride_d

    weight = ()
    for k in tl.static_range(K):
        p_weight = weight_ptr + d * weight_stride_d + k * weight_stride_k
        weight = weight + (tl.load(p_weight, mask=m_d, other=0.0).to(tl.float32),)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(tl.float32)

    if i < num_heads:
        x_seq, out_seq = x_ptr, out_ptr
        if starts_ptr is None:
            x_seq += i.to(tl.int64) * x_stride_b
            out_seq += i.to(tl.int64) * out_stride_b
        _head(
            i, d, m_d, x_seq, weight, bias, out_seq, states_ptr, starts_ptr, slots_ptr, initial_ptr,
            length, pad_slot_id, x_stride_t, out_stride_t, states_stride_s, states_stride_d, states_stride_k,
            K, HEAD, STATE_LEN, BLOCK_S, ALL_INITIAL, ZERO_NULL, SILU,
        )  # fmt: skip
    else:
        run = i - num_heads
        seq = run // runs
        first = (run % runs) * (BLOCK_T * TILES)
        x_ptr += seq.to(tl.int64) * x_stride_b
        out_ptr += seq.to(tl.int64) * out_stride_b
        weight_2d = ()
        for k in tl.static_range(K):
            weight_2d = weight_2d + (weight[k][None, :],)
        for tile in range(tl.minimum(TILES, tl.cdiv(length - first, BLOCK_T)).to(tl.int32)):
            t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
            # Tokens before K - 1 are heads whatever the batch: the taps need no mask of their own.
            m_x = ((t >= K - 1) & (t < length))[:, None] & m_d[None, :]
            taps = ()
            for k in tl.static_range(K):
                p_x = x_ptr[None, :] + (t.to(tl.int64) - (K - 1 - k))[:, None] * x_stride_t
                taps = taps + (tl.load(p_x, mask=m_x, other=0.0).to(tl.float32),)
            written = t >= K - 1
            inside = t >= 0
            if starts_ptr is not None:
                # After the loads were issued: the bisection hides behind them.
                owner = _sequence_of(t, starts_ptr, num_seqs, rounds)
                inside = (owner >= 0) & (owner < num_seqs)
                start = tl.load(starts_ptr + owner, mask=inside, other=0)
                written = (t - start >= K - 1) | ~inside
            if ZERO_NULL and slots_ptr is not None:
                inside = inside & (tl.load(slots_ptr + seq) != pad_slot_id)
            b_out = _convolve(taps, weight_2d, bias[None, :], SILU)
            b_out = tl.where(inside[:, None], b_out, 0.0)
            p_out = out_ptr[None, :] + t.to(tl.int64)[:, None] * out_stride_t
            m_out = (written & (t < length))[:, None] & m_d[None, :]
            tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)


# 256 channels are 16 bytes of bf16 a thread; 8 tokens at a time keep four programs on a multiprocessor. A
# launch without bodies (decode) waits for memory, not for bandwidth, and wants more programs.
TOKEN_MAJOR = {"BLOCK_T": 8, "BLOCK_D": 256, "TILES": 8}
TOKEN_MAJOR_HEADS_ONLY = {"BLOCK_T": 8, "BLOCK_D": 128, "TILES": 8}
CHANNEL_MAJOR = {"BLOCK_T": 64, "BLOCK_D": 32, "TILES": 1}


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    states: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    cache_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    all_initial: bool,
    zero_null: bool,
    pad_slot_id: int,
) -> None:
    """Convolve ``x`` ([B, D, L], or [D, T] with ``query_start_loc``) into ``out``, and advance ``states``.

    Args:
        all_initial: every sequence starts from its slot (``has_initial_state`` is then None).
        zero_null: sequences whose slot is ``pad_slot_id`` give zeros; otherwise they start from zeros.
    """
    if query_start_loc is not None:
        # A batch of one, whose stride must not vary with T.
        x, out = (
            x.as_strided((1, *x.shape), (0, *x.stride())),
            out.as_strided((1, *x.shape), (0, *out.stride())),
        )
    batch, channels, length = x.shape
    width = weight.shape[1]
    num_seqs = batch if query_start_loc is None else query_start_loc.shape[0] - 1
    if query_start_loc is None:
        head, has_body = min(length, width - 1), length > width - 1
    else:
        head, has_body = width - 1, length > 0
    blocks = TOKEN_MAJOR if has_body else TOKEN_MAJOR_HEADS_ONLY
    if x.stride(1) != 1:
        blocks = CHANNEL_MAJOR
    block_t, block_d, tiles = blocks["BLOCK_T"], blocks["BLOCK_D"], blocks["TILES"]
    block_d = min(block_d, triton.next_power_of_2(channels))
    runs = triton.cdiv(length, block_t * tiles) if has_body else 0
    num_heads = num_seqs if head > 0 else 0
    programs = (num_heads + batch * runs) * triton.cdiv(channels, block_d)
    if programs == 0:
        return
    state_len = 1 if states is None else states.shape[2]
    with torch.cuda.device_of(x):
        _causal_conv1d_kernel[(programs,)](
            out, x, weight, bias, states, query_start_loc, cache_indices, has_initial_state,
            channels, length, num_seqs, (num_seqs + 1).bit_length(), num_heads, max(runs, 1), pad_slot_id,
            *x.stride(), *out.stride(), *weight.stride(), *((0, 0, 0) if states is None else states.stride()),
            K=width, HEAD=head, STATE_LEN=state_len, BLOCK_S=triton.next_power_of_2(state_len),
            X_UNIT=x.stride(1) == 1, OUT_UNIT=out.stride(1) == 1,
            ALL_INITIAL=all_initial, ZERO_NULL=zero_null, SILU=silu,
            BLOCK_T=block_t, BLOCK_D=block_d, TILES=tiles, num_warps=4,
        )  # fmt: skip
