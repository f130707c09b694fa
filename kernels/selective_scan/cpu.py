"""The selective scan in plain torch: a few tokens at a time, all channels and states of a token at once.

The decays, which do not depend on the state, are computed for a block of tokens together; then the recurrence runs
token after token over ``[N, D]``, each state written over the decay that led to it; then the block is summed over its
states. A block's one temporary ``[tokens, N, D]`` stays in the cache, is made once and used again, so memory does not
grow with the length. Sequences follow one another: what one of them gives does not depend on the others of its batch.

A recurrence over chunks of tokens in parallel would use both threads in that one step, but needs the products of the
decays and a second pass to bring in the state that a chunk starts from: no faster, and rounding depends on the cut.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.cpu_sums import LOG2_E, MATMUL_STATES
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.selective_scan.arguments import SelectiveScan

_BLOCK_ELEMENTS = 3 << 18  # of the temporary: 3 MiB of float32
_PIECE = 4
"""Blocks whose ``[tokens, D]`` operations (gate, products) are done together: one is too small for two threads."""


def selective_scan_cpu(call: SelectiveScan) -> None:
    """On any device, in float32 or float64."""
    (
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, query_start_loc, cache_indices, has_initial_state,
        ssm_states, last_state, pad_slot_id, out, saved_states, save_states_every,
    ) = call  # fmt: skip
    dtype = wide_dtype(u.dtype)
    if query_start_loc is None:
        spans = [(row, 0, u.shape[-1]) for row in range(u.shape[0])]
    else:
        u, delta, B, C, out = u[None], delta[None], B[None], C[None], out[None]
        z = None if z is None else z[None]
        spans = [(0, start, stop) for start, stop in pairwise(query_start_loc.tolist())]
    slots = list(range(len(spans))) if cache_indices is None else cache_indices.tolist()
    initial = [False] * len(spans) if has_initial_state is None else has_initial_state.tolist()
    channels, n = A.shape
    longest = max((stop - start for _, start, stop in spans), default=0)
    block = max(1, min(longest, _BLOCK_ELEMENTS // max(1, n * channels)))
    scan = _Scan(A, D if D is None else D.to(dtype), delta_bias, delta_softplus, block, dtype)
    for s, (row, start, stop) in enumerate(spans):
        keeps = ssm_states is not None and (cache_indices is None or slots[s] != pad_slot_id)
        h = torch.zeros(n, channels, dtype=dtype, device=u.device)
        if ssm_states is not None and keeps and initial[s]:
            h.copy_(ssm_states[slots[s]].t())
        saved = None
        if saved_states is not None:
            count = -(-(stop - start) // save_states_every)
            first_row = 0 if query_start_loc is None else start // save_states_every + s
            of_sequence = saved_states[row] if query_start_loc is None else saved_states
            saved = _Saved(of_sequence[first_row : first_row + count], save_states_every, h)
        for first in range(start, stop, _PIECE * block):
            part = slice(first, min(first + _PIECE * block, stop))
            x, dt, b, c, y = (tensor[row, ..., part].movedim(-1, 0) for tensor in (u, delta, B, C, out))
            scan.advance(y, h, x, dt, b, c, None if z is None else z[row, :, part].t(), saved)
        if ssm_states is not None and keeps:
            ssm_states[slots[s]].t().copy_(h)
        if last_state is not None:
            last_state[s].t().copy_(h)


class _Saved:
    """The rows ``[ceil(tokens / every), N, D]`` of one sequence, filled while its tokens go by."""

    def __init__(self, rows: torch.Tensor, every: int, initial: torch.Tensor) -> None:
        self.rows, self.every, self.token = rows, every, 0
        self.rows[:1] = initial  # none for an empty sequence

    def take(self, states: torch.Tensor) -> None:
        """``states [tokens, N, D]`` after each of the next tokens: copy those before a multiple of ``every``."""
        first = self.every - 1 - self.token % self.every
        row = (self.token + first + 1) // self.every
        due = states[first :: self.every][: len(self.rows) - row]  # the last state of all has no row
        self.rows[row : row + len(due)] = due
        self.token += len(states)


class _Scan:
    """What every block of a call shares: the parameters, and the temporary."""

    def __init__(
        self,
        A: torch.Tensor,
        D: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        delta_softplus: bool,
        block: int,
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self.D, self.delta_softplus = dtype, D, delta_softplus
        self.delta_bias = None if delta_bias is None else delta_bias.to(dtype)
        self.A_ND = A.t().to(dtype).contiguous()
        self.states = self.A_ND.new_empty(block, *self.A_ND.shape)
        # A view a token, made once: making them costs as much as the arithmetic of a small model.
        self.steps = self.states.unbind()

    def advance(
        self,
        out: torch.Tensor,
        h: torch.Tensor,
        u: torch.Tensor,
        delta: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor | None,
        saved: _Saved | None,
    ) -> None:
        """``out [tokens, D]`` of ``u, delta, z [tokens, D]`` and ``B, C [tokens, G, N]``; ``h [N, D]`` in place."""
        x, dt = u.to(self.dtype), delta.to(self.dtype)
        if self.delta_bias is not None:
            dt = dt + self.delta_bias
        if self.delta_softplus:
            dt = F.softplus(dt, threshold=20.0)
        B, C = self._per_channel(B), self._per_channel(C)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        of_blocks = ((dt * LOG2_E)[:, None], (dt * x)[:, None], B, C, y)
        for block in zip(*(tensor.split(len(self.steps)) for tensor in of_blocks), strict=True):
            self._recur(h, saved, *block)
        if self.D is not None:
            y.addcmul_(x, self.D)
        if z is None:
            out.copy_(y)
        else:
            torch.mul(y, F.silu(z.to(self.dtype)), out=out)

    def _recur(
        self,
        h: torch.Tensor,
        saved: _Saved | None,
        exponents: torch.Tensor,
        increments: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        """``y [tokens, D] = sum_n h C`` of one block.

        ``exponents, increments [tokens, 1, D]``: ``dt * LOG2_E`` and ``dt * u``; B, C as :meth:`_per_channel` gives.
        """
        tokens = len(y)
        states = self.states if tokens == len(self.steps) else self.states[:tokens]
        torch.mul(exponents, self.A_ND, out=states).exp2_()  # the decays
        previous = h
        for state, increment, b in zip(self.steps[:tokens], increments.unbind(), B.unbind(), strict=True):
            previous = state.mul_(previous).addcmul_(increment, b)
        h.copy_(previous)
        if saved is not None:
            saved.take(states)
        if C.shape[2] == 1 and C.shape[1] <= MATMUL_STATES:
            torch.bmm(C.mT, states, out=y[:, None])
        else:
            torch.sum(states.mul_(C), 1, out=y)

    def _per_channel(self, x: torch.Tensor) -> torch.Tensor:
        """B or C, ``[tokens, G, N]``, as ``[tokens, N, 1]`` for one group, else ``[tokens, N, D]``."""
        x = x.to(self.dtype).transpose(1, 2)
        channels = self.A_ND.shape[1]
        return x if x.shape[2] in (1, channels) else x.repeat_interleave(channels // x.shape[2], dim=2)
