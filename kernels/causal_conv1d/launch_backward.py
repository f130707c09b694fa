"""The launches of the convolution's backward: which kernel serves a layout, and the sums over their programs."""

from __future__ import annotations

import torch

from tp_mamba.kernels.causal_conv1d import any_backward, mixer_backward
from tp_mamba.kernels.causal_conv1d.borders import borders
from tp_mamba.kernels.causal_conv1d.outputs import empty_rows
from tp_mamba.kernels.common.partial_sums import sum_partials


def launch(
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
    """Same contract as ``cpu_backward.causal_conv1d_backward_cpu``."""
    by_rows = x.stride(-2) == 1
    if by_rows and dout.stride(-2) != 1:
        dout = empty_rows(x, x.dim() - 2).copy_(dout)
    found: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)
    if query_start_loc is not None:
        found = borders(query_start_loc, x.shape[1], weight.shape[1])
        dx, dout, x = dx[None], dout[None], x[None]
    if initial is not None:
        any_backward.launch_states(dinitial, dout, dfinal, x, weight, bias, silu, initial, query_start_loc)
    if x.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return
    run = mixer_backward.launch if by_rows else any_backward.launch
    partials = run(dx, dout, dfinal, x, weight, bias, silu, initial, query_start_loc, *found)
    sum_partials(dweight.t(), partials[:, :-1])
    if bias is not None:
        sum_partials(dbias, partials[:, -1])
