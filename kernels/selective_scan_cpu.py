"""The selective scan in plain torch, vectorised over chunks of tokens.

Every sequence is cut into chunks of about ``sqrt(longest)`` tokens, the last one filled up with steps that change
nothing (dt = 0). Position after position, all chunks advance at once from a zero state; then the states are
handed from chunk to chunk, and each token adds what its chunk started from, decayed by the product of the
decays up to it. Only products of decays occur, never a quotient, so no decay is too strong or too weak.

The longest sequence thus decides how the others are cut, and the last bits of their results may change with it.
(Chunks of a fixed size would not end that, as torch's loops round by the place of an element in a tensor; and
at 16 tokens a chunk, both 64 sequences of 8 tokens and one of 8192 took 1.4 times as long.)

Channels go through in blocks, so that the temporaries ``[tokens, N, block]`` stay near the cache's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

MATMUL_STATES = 32
"""States summed by a matrix product, which adds one after the other; above, ``sum`` adds by a tree and rounds less."""
_BLOCK_ELEMENTS = 1 << 20  # of one temporary: 4 MiB of float32


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Where the tokens of a batch go: position ``j`` of chunk ``m`` is row ``j * M + m`` of a temporary."""

    size: int
    """Positions a chunk."""
    order: list[int]
    """Sequences, longest first: those with a k-th chunk are then the first so many of them."""
    counts: list[int]
    """How many sequences have a k-th chunk, for each k; chunks stand in the order of k."""
    row: torch.Tensor
    """``[tokens]`` batch row of each position (all 0 when packed)."""
    token: torch.Tensor
    """``[tokens]`` token in that row; a filling position repeats its sequence's last token."""
    real: torch.Tensor | None
    """The positions that are tokens; None if all are."""
    filling: torch.Tensor | None
    """The positions that only fill up a last chunk; None if there is none."""

    @classmethod
    def cut(cls, rows: list[int], starts: list[int], lengths: list[int], device: torch.device) -> _Chunks:
        longest = max(lengths, default=0)
        size = max(1, math.isqrt(longest))
        order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
        counts = [sum(length > k * size for length in lengths) for k in range(-(-longest // size))]
        chunks = [(s, k) for k, count in enumerate(counts) for s in order[:count]]
        sequence = torch.tensor([s for s, _ in chunks], dtype=torch.int64, device=device)
        rank = torch.tensor([k for _, k in chunks], dtype=torch.int64, device=device)
        row, start, length = (
            torch.tensor(x, dtype=torch.int64, device=device)[sequence] for x in (rows, starts, lengths)
        )
        position = torch.arange(size, device=device)[:, None] + rank * size
        token = (start + torch.minimum(position, length - 1)).flatten()
        is_real = (position < length).flatten()
        real = filling = None
        if not bool(is_real.all()):
            real, filling = is_real.nonzero().flatten(), (~is_real).nonzero().flatten()
        return cls(size, order, counts, row.expand(size, -1).flatten(), token, real, filling)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, channels, L]`` of any strides -> a new ``[tokens, channels]``."""
        if x.shape[0] == 1:
            return x[0].t().index_select(0, self.token)
        return x.transpose(1, 2)[self.row, self.token]

    def scatter(self, out: torch.Tensor, y: torch.Tensor) -> None:
        """The inverse of :meth:`gather`, without the filling, into ``out [rows, channels, L]``."""
        row, token = self.row, self.token
        if self.real is not None:
            row, token, y = row[self.real], token[self.real], y[self.real]
        if out.shape[0] == 1:
            out[0].t().index_copy_(0, token, y.to(out.dtype))
        else:
            out.transpose(1, 2)[row, token] = y.to(out.dtype)


def selective_scan_cpu(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    query_start_loc: torch.Tensor | None,
    cache_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    ssm_states: torch.Tensor | None,
    last_state: torch.Tensor | None,
    pad_slot_id: int,
    out: torch.Tensor,
) -> None:
    """Arguments as the op ``tp_mamba::selective_scan``; any device, computing in float32 or float64."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    channels, n = A.shape
    if query_start_loc is None:
        rows, length = u.shape[0], u.shape[-1]
        chunks = _Chunks.cut(list(range(rows)), [0] * rows, [length] * rows, u.device)
    else:
        u, delta, B, C, out = u[None], delta[None], B[None], C[None], out[None]
        z = None if z is None else z[None]
        starts = query_start_loc.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
        chunks = _Chunks.cut([0] * len(lengths), starts[:-1], lengths, u.device)
    group_size = channels // B.shape[1]
    block = max(1, min(channels, _BLOCK_ELEMENTS // max(1, n * chunks.token.numel())))
    if B.shape[1] > 1:  # whole groups, or equal parts of one
        block = math.gcd(block, group_size) if block < group_size else block // group_size * group_size
    reads, writes, slot_of = _slots(
        chunks.order, cache_indices, has_initial_state, ssm_states, pad_slot_id, u.device
    )

    groups, b, c = None, B, C
    for start in range(0, channels, block):
        mine = slice(start, min(start + block, channels))
        h = torch.zeros(len(chunks.order), n, mine.stop - start, dtype=dtype, device=u.device)
        if ssm_states is not None and len(reads):
            h[reads] = ssm_states[slot_of[reads], mine].transpose(1, 2).to(dtype)
        if chunks.counts:
            wanted = slice(start // group_size, (mine.stop - 1) // group_size + 1)
            if groups != wanted:
                b, c = (
                    _per_channel(chunks.gather(x[:, wanted].flatten(1, 2)), n, group_size, dtype)
                    for x in (B, C)
                )
                groups = wanted
            x, dt = chunks.gather(u[:, mine]).to(dtype), chunks.gather(delta[:, mine]).to(dtype)
            if delta_bias is not None:
                dt += delta_bias[mine].to(dtype)
            if delta_softplus:
                dt = F.softplus(dt, threshold=20.0)
            if chunks.filling is not None:
                x[chunks.filling], dt[chunks.filling] = 0, 0
            y = _scan_block(chunks, x, dt, A[mine].to(dtype), b, c, h)
            if D is not None:
                y.addcmul_(x, D[mine].to(dtype))
            if z is not None:
                y.mul_(F.silu(chunks.gather(z[:, mine]).to(dtype)))
            chunks.scatter(out[:, mine], y)
        if ssm_states is not None and len(writes):
            ssm_states[slot_of[writes], mine] = h[writes].transpose(1, 2).to(ssm_states.dtype)
        if last_state is not None:
            last_state[chunks.order, mine] = h.transpose(1, 2)


def _slots(
    order: list[int],
    cache_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    ssm_states: torch.Tensor | None,
    pad_slot_id: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which sequences, in ``order``, read a state and which write one, and the slot of each."""
    sequence = torch.tensor(order, dtype=torch.int64, device=device)
    if ssm_states is None:
        return sequence[:0], sequence[:0], sequence
    slot = sequence if cache_indices is None else cache_indices[sequence].long()
    keeps = torch.ones_like(slot, dtype=torch.bool) if cache_indices is None else slot != pad_slot_id
    starts = keeps & has_initial_state[sequence] if has_initial_state is not None else torch.zeros_like(keeps)
    return starts.nonzero().flatten(), keeps.nonzero().flatten(), slot


def _per_channel(x: torch.Tensor, n: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """``[tokens, groups * N]`` as ``[tokens, N, 1]`` for one group, else ``[tokens, N, channels]``."""
    x = x.to(dtype).unflatten(1, (-1, n)).transpose(1, 2)
    return x if x.shape[2] == 1 else x.repeat_interleave(group_size, dim=2)


def _scan_block(
    chunks: _Chunks,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    h: torch.Tensor,
) -> torch.Tensor:
    """Scan a block of channels; ``x, dt [tokens, block]``, ``A [block, N]``, ``b, c`` as :func:`_per_channel`.

    ``h [S, N, block]`` goes from first to last state in place. Returns ``sum_n h C``, ``[tokens, block]``.
    """
    decay = torch.mul(dt[:, None], A.t()[None]).exp_()
    state = torch.mul((dt * x)[:, None], b)
    decays, states = decay.unflatten(0, (chunks.size, -1)), state.unflatten(0, (chunks.size, -1))
    for j in range(1, chunks.size):
        states[j].addcmul_(decays[j], states[j - 1])
        decays[j].mul_(decays[j - 1])

    entering = torch.empty_like(states[0])
    done = 0
    for count in chunks.counts:
        those = slice(done, done + count)
        entering[those] = h[:count]
        torch.addcmul(states[-1, those], decays[-1, those], h[:count], out=h[:count])
        done += count
    states.addcmul_(decays, entering)
    if c.shape[2] == 1 and c.shape[1] <= MATMUL_STATES:
        return torch.bmm(c.transpose(1, 2), state)[:, 0]
    return (state * c).sum(1)
