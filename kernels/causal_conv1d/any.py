"""Triton kernel of the causal depthwise convolution for every layout: prefill, packed batches and decode in one launch.

The grid holds two kinds of programs, each over a block of channels:

* one *head* program per sequence: the first ``K - 1`` tokens, which may need the sequence's state, and the state
  itself. It alone touches its slot and reads it whole before it writes, so nothing has to be ordered between programs;
* one *body* program per run of tokens: the tokens at least ``K - 1`` after their sequence's start, which need nothing
  but ``x``. In a packed batch every token finds its start by bisection, on the device, so neither the host nor the grid
  knows any length but the sum.

One token per row in a mixer's layout has a kernel of its own, in ``mixer.py``.
"""

# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tp_mamba.kernels.causal_conv1d.arguments import Convolution
from tp_mamba.kernels.causal_conv1d.launch import sequences_plan
from tp_mamba.kernels.causal_conv1d.taps import convolve, is_packed, load_taps
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.launches import Launch, launcher


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
    K: tl.constexpr, HEAD: tl.constexpr, STATE_LEN: tl.constexpr,
    STATES_UNIT: tl.constexpr, ALL_INITIAL: tl.constexpr, ZERO_NULL: tl.constexpr, SILU: tl.constexpr,
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
        states_ptr += slot * states_stride_s + (d if STATES_UNIT else d * states_stride_d)
        for k in tl.static_range(K - 1):
            column = states_ptr + (STATE_LEN - (K - 1) + k) * states_stride_k
            window = window + (tl.load(column, mask=m_d & initial, other=0.0).to(tl.float32),)
        # Column c of the new state is input length - STATE_LEN + c of the sequence, or an old column.
        m_state = m_d & real & ((length > 0) | ~initial)
        columns = ()
        for c in tl.static_range(STATE_LEN):
            p = length - STATE_LEN + c
            p_old = states_ptr + (c + length) * states_stride_k
            b_old = tl.load(p_old, mask=m_state & (p < 0) & initial, other=0.0)
            b_new = tl.load(x_ptr + p * x_stride_t, mask=m_state & (p >= 0), other=0.0)
            columns = columns + (tl.where(p < 0, b_old, b_new.to(b_old.dtype)),)

    for t in tl.static_range(HEAD):
        b_x = tl.load(x_ptr + t * x_stride_t, mask=m_d & (t < length), other=0.0)
        window = window + (b_x.to(tl.float32),)
    for t in tl.static_range(HEAD):
        taps = ()
        for k in tl.static_range(K):
            taps = taps + (window[t + k],)
        b_out = convolve(taps, weight, bias, SILU)
        if ZERO_NULL:
            b_out = tl.where(real, b_out, 0.0)
        tl.store(out_ptr + t * out_stride_t, b_out.to(out_ptr.dtype.element_ty), mask=m_d & (t < length))

    if states_ptr is not None:
        # Threads may exchange columns: every read of the slot comes before every write.
        tl.debug_barrier()
        for c in tl.static_range(STATE_LEN):
            tl.store(states_ptr + c * states_stride_k, columns[c], mask=m_state)


@triton.jit
def _owner(t, starts_ptr, num_seqs, rounds, length):
    """The sequence that holds token t: whether there is one, its start, and its end."""
    inside = t >= 0
    start = tl.zeros_like(t)
    stop = start + length
    if starts_ptr is not None:
        owner = _sequence_of(t, starts_ptr, num_seqs, rounds)
        inside = (owner >= 0) & (owner < num_seqs)
        start = tl.load(starts_ptr + owner, mask=inside, other=0).to(tl.int64)
        stop = tl.load(starts_ptr + owner + 1, mask=inside, other=0).to(tl.int64)
    return inside, start, stop


@triton.jit
def _owner_from(first, t, count, starts_ptr, num_seqs, rounds, length, K: tl.constexpr):
    """Start and end of the sequence that holds token ``first + t``, counted from ``first``, as far as a run sees.

    Starts before K - 1 tokens ago are all alike, and so are ends beyond the run.
    """
    _, start, stop = _owner(first + t, starts_ptr, num_seqs, rounds, length)
    start = tl.maximum(start - first, 1 - K).to(tl.int32)
    return start, tl.minimum(tl.maximum(stop - first, 0), count).to(tl.int32)


@triton.jit
def _load_tokens(x_ptr, inside, m_d, x_stride_t: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows from x_ptr on as they are in memory, zeros from row ``inside`` on."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(x_ptr + i * x_stride_t, mask=m_d & (i < inside), other=0.0),)
    return rows


@triton.jit
def _load_weight(d, m_d, weight_ptr, bias_ptr, stride_d, stride_k, K: tl.constexpr, PACKED: tl.constexpr):
    """The taps, a K-tuple, and the bias of channels d, in float32."""
    bias = tl.zeros(d.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(tl.float32)
    return load_taps(weight_ptr, 0, d, m_d, stride_d, stride_k, K, PACKED), bias


@triton.jit
def _walk(
    first, count, d, m_d, x_ptr, weight_ptr, bias_ptr, out_ptr, starts_ptr, num_seqs, rounds, length, live,
    x_stride_t: tl.constexpr, out_stride_t: tl.constexpr, weight_stride_d, weight_stride_k,
    K: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``count`` tokens from first on, one group at a time, the next one in flight, the last K - 1 inputs kept.

    Every token is read once, but K times in a group that holds a start or an end, to keep the code small.
    x_ptr and out_ptr point at token ``first``, and tokens count from there.
    """
    # x before the weights: what is waited for first is asked for first.
    before = _load_tokens(x_ptr - (K - 1) * x_stride_t, K - 1, m_d & (first > 0), x_stride_t, K - 1)
    ahead = _load_tokens(x_ptr, count, m_d, x_stride_t, GROUP)
    weight, bias = _load_weight(d, m_d, weight_ptr, bias_ptr, weight_stride_d, weight_stride_k, K, PACKED)
    window = ()
    for k in tl.static_range(K - 1):
        window = window + (before[k].to(tl.float32),)
    # The bisection, load after load, while x is in flight.
    start, stop = _owner_from(first, 0, count, starts_ptr, num_seqs, rounds, length, K)
    for j in range(tl.cdiv(count, GROUP)):
        t = j * GROUP
        group = window
        for i in tl.static_range(GROUP):
            group = group + (ahead[i].to(tl.float32),)
        x_ptr += GROUP * x_stride_t
        ahead = _load_tokens(x_ptr, count - (t + GROUP), m_d, x_stride_t, GROUP)
        if t >= stop:
            start, stop = _owner_from(first, t, count, starts_ptr, num_seqs, rounds, length, K)
        # (Outside all sequences stop is no later than t.)
        if live & (t - start >= K - 1) & (t + GROUP <= stop):
            for i in tl.static_range(GROUP):
                inputs = ()
                for k in tl.static_range(K):
                    inputs = inputs + (group[i + k],)
                b_out = convolve(inputs, weight, bias, SILU)
                tl.store(out_ptr + i * out_stride_t, b_out.to(out_ptr.dtype.element_ty), mask=m_d)
        else:
            for i_s in range(tl.minimum(count - t, GROUP)):
                s = t + i_s
                row = tl.zeros((), tl.int64) + i_s
                p_x = x_ptr + (row - GROUP - (K - 1)) * x_stride_t
                inputs = ()
                for k in tl.static_range(K):
                    # Tokens before K - 1 are heads whatever the batch: the taps need no mask of their own.
                    b_x = tl.load(p_x + k * x_stride_t, mask=m_d & (first + s >= K - 1), other=0.0)
                    inputs = inputs + (b_x.to(tl.float32),)
                if s >= stop:
                    start, stop = _owner_from(first, s, count, starts_ptr, num_seqs, rounds, length, K)
                inside = s < stop
                b_out = tl.where(inside & live, convolve(inputs, weight, bias, SILU), 0.0)
                written = (s - start >= K - 1) | ~inside
                p_out = out_ptr + row * out_stride_t
                tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_d & written)
        out_ptr += GROUP * out_stride_t
        window = ()
        for k in tl.static_range(K - 1):
            window = window + (group[GROUP + k],)


@triton.jit
def _tiles(
    first, count, m_d, x_ptr, weight, bias, out_ptr, starts_ptr, num_seqs, rounds, length, live,
    x_stride_t, out_stride_t, K: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``count`` tokens from first on where neighbouring threads read neighbouring tokens: each is read K times."""
    weight_2d = ()
    for k in tl.static_range(K):
        weight_2d = weight_2d + (weight[k][None, :],)
    for tile in range(tl.cdiv(count, BLOCK_T)):
        t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        # Tokens before K - 1 are heads whatever the batch: the taps need no mask of their own.
        m_x = ((t >= K - 1) & (t < length))[:, None] & m_d[None, :]
        taps = ()
        for k in tl.static_range(K):
            p_x = x_ptr[None, :] + (t - (K - 1 - k))[:, None] * x_stride_t
            taps = taps + (tl.load(p_x, mask=m_x, other=0.0).to(tl.float32),)
        # After the loads were issued: the bisection hides behind them.
        inside, start, _ = _owner(t, starts_ptr, num_seqs, rounds, length)
        written = (t < length) & ((t - start >= K - 1) | ~inside)
        b_out = convolve(taps, weight_2d, bias[None, :], SILU)
        b_out = tl.where((inside & live)[:, None], b_out, 0.0)
        p_out = out_ptr[None, :] + t[:, None] * out_stride_t
        tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=written[:, None] & m_d[None, :])


# Whatever varies from batch to batch compiles no other variant: lengths, counts, strides that follow a
# length, and the alignment of index tensors, which are often slices of longer ones.
_VARYING = ["length", "num_seqs", "rounds", "num_heads", "runs", "run_tokens", "x_stride_d", "out_stride_d"]


@triton.jit(
    do_not_specialize=_VARYING,
    do_not_specialize_on_alignment=["starts_ptr", "slots_ptr", "initial_ptr"],
)
def _causal_conv1d_kernel(
    out_ptr,  # [B, D, L] or [1, D, T], out
    x_ptr,  # like out, in
    weight_ptr,  # [D, K], in
    bias_ptr,  # [D], in; or None
    states_ptr,  # [slots, D, STATE_LEN], in and out; or None
    starts_ptr,  # [S + 1] integers: packed batch; None: dense batch
    slots_ptr,  # [S] integers or None: slot s is sequence s
    initial_ptr,  # [S] bool or None
    length: tl.int64,  # L, or T of a packed batch
    num_seqs,
    rounds,  # of the bisection: enough for num_seqs + 1 entries
    num_heads,  # head programs for each block of channels
    runs,  # body programs for each block of channels (and sequence of a dense batch)
    run_tokens,  # of a body program, a multiple of BLOCK_T
    pad_slot_id,
    x_stride_b: tl.int64, x_stride_d: tl.int64, out_stride_b: tl.int64, out_stride_d: tl.int64,
    weight_stride_d, weight_stride_k,
    states_stride_s: tl.int64, states_stride_d: tl.int64, states_stride_k: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into addresses, masks and divisions.
    D: tl.constexpr, x_stride_t: tl.constexpr, out_stride_t: tl.constexpr,
    K: tl.constexpr, HEAD: tl.constexpr, STATE_LEN: tl.constexpr,
    X_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, STATES_UNIT: tl.constexpr,
    ALL_INITIAL: tl.constexpr, ZERO_NULL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Blocks of channels vary fastest: neighbouring programs read neighbouring addresses.
    blocks_d: tl.constexpr = tl.cdiv(D, BLOCK_D)
    i_d = tl.program_id(0) % blocks_d
    i = tl.program_id(0) // blocks_d
    d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (d >= 0) if D % BLOCK_D == 0 else (d < D)
    # A length-dependent stride (channel-major x) must not be specialised, a unit one must.
    x_ptr += d if X_UNIT else d * x_stride_d
    out_ptr += d if OUT_UNIT else d * out_stride_d

    if i < num_heads:
        weight, bias = _load_weight(d, m_d, weight_ptr, bias_ptr, weight_stride_d, weight_stride_k, K, PACKED)
        x_seq, out_seq = x_ptr, out_ptr
        if starts_ptr is None:
            x_seq += i.to(tl.int64) * x_stride_b
            out_seq += i.to(tl.int64) * out_stride_b
        _head(
            i, d, m_d, x_seq, weight, bias, out_seq, states_ptr, starts_ptr, slots_ptr, initial_ptr,
            length, pad_slot_id, x_stride_t, out_stride_t, states_stride_s, states_stride_d, states_stride_k,
            K, HEAD, STATE_LEN, STATES_UNIT, ALL_INITIAL, ZERO_NULL, SILU,
        )  # fmt: skip
    else:
        run = i - num_heads
        seq = 0
        if starts_ptr is None:
            seq = run // runs
            run = run % runs
            x_ptr += seq.to(tl.int64) * x_stride_b
            out_ptr += seq.to(tl.int64) * out_stride_b
        first = run.to(tl.int64) * run_tokens
        count = tl.minimum(length - first, run_tokens).to(tl.int32)
        live = first >= 0
        if ZERO_NULL and slots_ptr is not None:
            live = tl.load(slots_ptr + seq) != pad_slot_id
        if X_UNIT and OUT_UNIT:
            _walk(
                first, count, d, m_d, x_ptr + first * x_stride_t, weight_ptr, bias_ptr,
                out_ptr + first * out_stride_t, starts_ptr, num_seqs, rounds, length, live,
                x_stride_t, out_stride_t, weight_stride_d, weight_stride_k, K, PACKED, SILU, BLOCK_T,
            )  # fmt: skip
        else:
            weight, bias = _load_weight(
                d, m_d, weight_ptr, bias_ptr, weight_stride_d, weight_stride_k, K, PACKED
            )
            _tiles(
                first, count, m_d, x_ptr, weight, bias, out_ptr, starts_ptr, num_seqs, rounds, length, live,
                x_stride_t, out_stride_t, K, SILU, BLOCK_T,
            )  # fmt: skip


@launcher(tensors=8)
def launch(*arguments: Any) -> Launch | None:
    """Launch the kernel for a :class:`Convolution`, whose fields these are."""
    call = Convolution(*arguments)
    x, out, weight, states = call.x, call.out, call.weight, call.states
    width = weight.shape[1]
    if call.query_start_loc is None:
        batch, channels, length = x.shape
        num_seqs, head, has_body = batch, min(length, width - 1), length > width - 1
        x_strides, out_strides = x.stride(), out.stride()
    else:  # a batch of one, whose stride must not vary with T
        batch, (channels, length) = 1, x.shape
        num_seqs, head, has_body = call.query_start_loc.shape[0] - 1, width - 1, length > 0
        x_strides, out_strides = (0, *x.stride()), (0, *out.stride())
    by_rows = x_strides[1] == 1
    plan = sequences_plan(batch * length, channels, has_body, by_rows)
    runs = cdiv(length, plan.run_tokens) if has_body else 0
    num_heads = num_seqs if head > 0 else 0
    programs = (num_heads + batch * runs) * cdiv(channels, plan.BLOCK_D)
    if programs == 0:
        return None
    values = (
        length, num_seqs, (num_seqs + 1).bit_length(), num_heads, max(runs, 1), plan.run_tokens, call.pad_slot_id,
        *x_strides[:2], *out_strides[:2], *weight.stride(), *((0, 0, 0) if states is None else states.stride()),
    )  # fmt: skip
    constants = {
        "D": channels, "x_stride_t": x_strides[2], "out_stride_t": out_strides[2], "K": width, "HEAD": head,
        "STATE_LEN": 1 if states is None else states.shape[2], "X_UNIT": by_rows, "OUT_UNIT": out_strides[1] == 1,
        "STATES_UNIT": states is not None and states.stride(1) == 1, "ALL_INITIAL": call.all_initial,
        "ZERO_NULL": call.zero_null, "PACKED": is_packed(weight), "SILU": call.silu,
        "BLOCK_T": plan.BLOCK_T, "BLOCK_D": plan.BLOCK_D, "num_warps": plan.num_warps,
    }  # fmt: skip
    return Launch(_causal_conv1d_kernel, (programs,), values, constants)
