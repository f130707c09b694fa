"""The backward of the selective scan in Triton: which kernel serves a call.

For the time of a call it takes, beside the gradients: for partial sums of dB and dC ``8 N`` bytes per token and block
of channels (4 bytes per token and channel at N = 16 and blocks of 32); and per segment of 512 tokens, begun ones
included, and channel ``4 (N + 2)`` bytes for those of dA, dD and d(bias), ``4 N * groups`` for states within a stretch,
and ``4 (N + 1)`` for what segments hand to the one before them.
"""

from __future__ import annotations

from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.selective_scan.arguments import ScanBackward, ScanGradients


def selective_scan_backward(call: ScanBackward, grads: ScanGradients) -> None:
    """Write ``grads``; those of tokens that no sequence has are zeros."""
    from tp_mamba.kernels.selective_scan import backward_any, backward_mixer, partial_sums

    if call.sequences == 0 or call.u.numel() == 0:
        for x in grads:
            if x is not None:
                x.zero_()
        if grads.initial is not None and call.grad_final is not None:
            grads.initial.copy_(call.grad_final)
        return
    kernel = backward_mixer if backward_mixer.serves(call, grads) else backward_any
    with on_device_of(call.u):
        dbc, sums = kernel.launch(call, grads)
        partial_sums.sum_partial(call, grads, dbc, sums)
