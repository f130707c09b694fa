"""The backward of the selective scan in plain torch, one stretch between saved states at a time, the last one first.

The states of a stretch are recomputed from the one saved before it, and then the recurrence of their gradients runs
over them from the last token to the first. What is not a recurrence is done for all tokens of the stretch together.
Three temporaries ``[save_every, N, D]`` are made once and used again, so memory does not grow with the length.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from tp_mamba.kernels.common.cpu_sums import LOG2_E, MATMUL_STATES
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.selective_scan.arguments import ScanBackward, ScanGradients


def selective_scan_backward_cpu(call: ScanBackward, grads: ScanGradients) -> None:
    """Write ``grads``, on any device, in float32 or float64; but for tokens that no sequence has."""
    starts, every = call.query_start_loc, call.save_every
    by_token: dict[str, Any] = {
        "grad_out": call.grad_out, "u": call.u, "delta": call.delta, "z": call.z, "B": call.B, "C": call.C,
        "du": grads.u, "ddelta": grads.delta, "dz": grads.z, "dB": grads.B, "dC": grads.C,
    }  # fmt: skip
    if starts is None:
        spans = [(row, 0, call.u.shape[-1]) for row in range(call.u.shape[0])]
    else:
        by_token = {name: None if x is None else x[None] for name, x in by_token.items()}
        spans = [(0, start, stop) for start, stop in pairwise(starts.tolist())]
    scan = _ScanBackward(call)
    for s, (row, start, stop) in enumerate(spans):
        carry = scan.start(None if call.grad_final is None else call.grad_final[s])
        saved = call.saved_states[row] if starts is None else call.saved_states[start // every + s :]
        for first in range((stop - start - 1) // every * every, -1, -every):
            part = slice(start + first, min(start + first + every, stop))
            of_part: dict[str, Any] = {
                name: None if x is None else x[row, ..., part].movedim(-1, 0) for name, x in by_token.items()
            }
            scan.retreat(carry, saved[first // every], **of_part)
        if grads.initial is not None:
            grads.initial[s].t().copy_(carry)
    grads.A.t().copy_(scan.dA_ND)
    if grads.D is not None:
        grads.D.copy_(scan.dD_D)
    if grads.delta_bias is not None:
        grads.delta_bias.copy_(scan.dbias_D)


class _ScanBackward:
    """What every stretch of a call shares: the parameters, the sums over all tokens, and the temporaries."""

    def __init__(self, call: ScanBackward) -> None:
        self.dtype = wide_dtype(call.u.dtype)
        self.D, self.delta_bias = (None if x is None else x.to(self.dtype) for x in (call.D, call.delta_bias))
        self.delta_softplus = call.delta_softplus
        self.A_ND = call.A.t().to(self.dtype).contiguous()
        n, channels = self.A_ND.shape
        tokens = min(call.save_every, call.u.shape[-1])
        self.states, self.decays, self.lams = self.A_ND.new_empty(3, tokens, n, channels)
        self.dA_ND = torch.zeros_like(self.A_ND)
        self.dD_D, self.dbias_D = self.A_ND.new_zeros(2, channels)

    def start(self, grad_final: torch.Tensor | None) -> torch.Tensor:
        """``[N, D]``, the gradient of a sequence's last state."""
        return torch.zeros_like(self.A_ND) if grad_final is None else grad_final.t().to(self.dtype, copy=True)

    def retreat(
        self,
        carry: torch.Tensor,
        h: torch.Tensor,
        *,
        grad_out: torch.Tensor,
        u: torch.Tensor,
        delta: torch.Tensor,
        z: torch.Tensor | None,
        B: torch.Tensor,
        C: torch.Tensor,
        du: torch.Tensor,
        ddelta: torch.Tensor,
        dz: torch.Tensor | None,
        dB: torch.Tensor,
        dC: torch.Tensor,
    ) -> None:
        """One stretch of tokens.

        ``carry [N, D]``: the gradient of the state after it, and then, in place, of ``h [N, D]``, the state before it.
        ``u, delta, z, grad_out [tokens, D]``, ``B, C [tokens, G, N]``; ``du`` to ``dC``, laid out alike, are written.
        """
        x, dt, g = u.to(self.dtype), delta.to(self.dtype), grad_out.to(self.dtype)
        slope = None
        if self.delta_bias is not None:
            dt = dt + self.delta_bias
        if self.delta_softplus:
            slope = torch.where(dt > 20.0, 1.0, torch.sigmoid(dt))
            dt = F.softplus(dt, threshold=20.0)
        per_group, dtx = x.shape[1] // B.shape[1], dt * x
        b, c = (y.to(self.dtype).transpose(1, 2) for y in (B, C))
        if b.shape[2] > 1:
            b, c = (y if per_group == 1 else y.repeat_interleave(per_group, dim=2) for y in (b, c))

        states, decays = self.states[: len(x)], self.decays[: len(x)]
        torch.mul((dt * LOG2_E)[:, None], self.A_ND, out=decays).exp2_()
        before = h
        for state, decay, increment, b_t in zip(*(y.unbind() for y in (states, decays, dtx, b)), strict=True):
            before = torch.mul(decay, before, out=state).addcmul_(increment, b_t)

        if z is not None:
            y = _sum_over_states(states, c)
            if self.D is not None:
                y.addcmul_(x, self.D)
            gate = z.to(self.dtype)
            s = torch.sigmoid(gate)
            assert dz is not None
            dz.copy_(g * y * s * (1 + gate * (1 - s)))
            g = g * gate * s
        dC.copy_(_sum_over_channels(states, g, dC.shape[1]))

        lams, after = self.lams[: len(x)], carry
        for lam, decay, g_t, c_t in zip(
            *(tuple(reversed(y.unbind())) for y in (lams, decays, g, c)), strict=True
        ):
            torch.addcmul(after, c_t, g_t, out=lam)
            after = decay.mul_(lam)  # what the state before the token gets; in the place of the decay
        carry.copy_(after)
        dh_x = _sum_over_states(lams, b)
        dB.copy_(_sum_over_channels(lams, dtx, dB.shape[1]))
        e = decays  # becomes the gradient of dt * A
        e[0].mul_(h)
        e[1:].mul_(states[:-1])
        self.dA_ND += torch.mul(e, dt[:, None], out=lams).sum(0)
        d_dt = e.mul_(self.A_ND).sum(1)
        d_dt.addcmul_(dh_x, x)
        grad_u = dh_x.mul_(dt)
        if self.D is not None:
            grad_u.addcmul_(g, self.D)
            self.dD_D += (g * x).sum(0)
        du.copy_(grad_u)
        if slope is not None:
            d_dt.mul_(slope)
        self.dbias_D += d_dt.sum(0)
        ddelta.copy_(d_dt)


def _sum_over_states(states: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``sum_n states * c``: ``[tokens, N, D]`` and ``[tokens, N, 1 or D]`` to ``[tokens, D]``."""
    by_product = c.shape[2] == 1 and c.shape[1] <= MATMUL_STATES
    return torch.bmm(c.mT, states)[:, 0] if by_product else (states * c).sum(1)


def _sum_over_channels(states: torch.Tensor, x: torch.Tensor, groups: int) -> torch.Tensor:
    """``sum_d states * x`` within groups: ``[tokens, N, D]`` and ``[tokens, D]`` to ``[tokens, G, N]``."""
    if groups == 1:
        return torch.bmm(states, x[:, :, None]).mT
    products = states * x[:, None]
    return products.unflatten(2, (groups, -1)).sum(-1).mT
