"""The convolution's backward in plain torch, float32 inside (float64 for float64): K shifted multiply-adds each way.

Everything is token-major here, ``[.., L, D]``. Each sequence's inputs are laid out behind the K - 1 of its state, those
of a packed batch one sequence after another, so that any batch is convolved at once and no tap reaches over a border.
"""

from __future__ import annotations

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


def causal_conv1d_backward_cpu(
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    dinitial: torch.Tensor,
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
) -> None:
    """Write the four gradients; ``dbias`` only with a bias and ``dinitial`` only with initial states."""
    dtype, past = wide_dtype(x.dtype), weight.shape[1] - 1
    weight_KD, bias_D = weight.t().to(dtype), None if bias is None else bias.to(dtype)
    x, dout, dx = x.transpose(-2, -1), dout.transpose(-2, -1), dx.transpose(-2, -1)
    if query_start_loc is None:
        B, L, D = x.shape
        inputs = x.new_zeros(B, past + L, D, dtype=dtype)
        inputs[:, past:] = x
        if initial is not None:
            inputs[:, :past] = initial.transpose(1, 2)
        dinputs = _differentiate(inputs, dout.to(dtype), weight_KD, bias_D, silu, dweight, dbias)
        if dfinal is not None:
            dinputs[:, L:] += dfinal.transpose(1, 2)
        dx.copy_(dinputs[:, past:])
        if initial is not None:
            dinitial.copy_(dinputs[:, :past].transpose(1, 2))
        return

    starts = query_start_loc.long()
    first, last = (int(starts[i]) for i in (0, -1))
    sequence = torch.arange(len(starts) - 1, device=x.device)
    owner = torch.repeat_interleave(sequence, starts.diff(), output_size=last - first)
    tokens = torch.arange(last - first, device=x.device) + (owner + 1) * past
    column = torch.arange(past, device=x.device)
    before = (starts[:-1] - first + sequence * past)[:, None] + column
    after = (starts[1:] - first + sequence * past)[:, None] + column
    rows, D = last - first + len(sequence) * past, x.shape[1]
    inputs, dpadded = x.new_zeros(rows, D, dtype=dtype), x.new_zeros(rows, D, dtype=dtype)
    inputs[tokens], dpadded[tokens] = x[first:last].to(dtype), dout[first:last].to(dtype)
    if initial is not None:
        inputs[before] = initial.transpose(1, 2).to(dtype)
    dinputs = _differentiate(inputs[None], dpadded[None, past:], weight_KD, bias_D, silu, dweight, dbias)[0]
    if dfinal is not None:
        dinputs[after] += dfinal.transpose(1, 2)
    dx[:first], dx[last:] = 0, 0
    dx[first:last] = dinputs[tokens].to(dx.dtype)
    if initial is not None:
        dinitial.copy_(dinputs[before].transpose(1, 2))


def _differentiate(
    inputs: torch.Tensor,
    dout: torch.Tensor,
    weight_KD: torch.Tensor,
    bias_D: torch.Tensor | None,
    silu: bool,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> torch.Tensor:
    """Write ``dweight`` and ``dbias``; returns the gradient of ``inputs [B, K - 1 + L, D]``; ``dout [B, L, D]``."""
    taps, L = weight_KD.unbind(), dout.shape[1]
    g = dout
    if silu:
        p = inputs[:, :L] * taps[0] if bias_D is None else torch.addcmul(bias_D, inputs[:, :L], taps[0])
        for k in range(1, len(taps)):
            p.addcmul_(inputs[:, k : k + L], taps[k])
        g = torch.ops.aten.silu_backward(dout, p)
    dinputs = torch.zeros_like(inputs)
    for k, tap in enumerate(taps):
        dinputs[:, k : k + L].addcmul_(g, tap)
        dweight[:, k] = (g * inputs[:, k : k + L]).sum((0, 1))
    if bias_D is not None:
        dbias.copy_(g.sum((0, 1)))
    return dinputs
