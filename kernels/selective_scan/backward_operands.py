"""What both kernels of the scan's backward are passed, and the memory that they work in."""

from __future__ import annotations

import torch

from tp_mamba.kernels.selective_scan.arguments import ScanBackward, ScanGradients


def memory(
    call: ScanBackward, parts: int, rows: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(scratch [parts, rows, N, D], dbc [blocks, tokens, G, 2, N], sums [parts, N + 2, D])``, float32.

    ``parts``: sequences, or segments of them.
    """
    (channels, n), tokens = call.A.shape, call.u.numel() // call.u.shape[-2]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=call.u.device)

    dbc = empty(blocks, tokens, call.B.shape[-3], 2, n)
    return empty(parts, rows, n, channels), dbc, empty(parts, n + 2, channels)


def tensors_of(
    call: ScanBackward,
    grads: ScanGradients,
    grad_out: torch.Tensor,
    scratch: torch.Tensor,
    dbc: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """The tensors in the order in which both kernels take them."""
    return (
        grad_out, call.u, call.delta, call.z, call.A, call.B, call.C, call.D, call.delta_bias, call.saved_states,
        scratch, call.grad_final, call.query_start_loc, grads.u, grads.delta, grads.z, dbc, sums, grads.initial,
    )  # fmt: skip


def strides_of(call: ScanBackward, grads: ScanGradients) -> tuple[int, ...]:
    """Strides of D, delta_bias, and the gradients of the final and of the initial states."""
    D, bias = (0 if x is None else x.stride(0) for x in (call.D, call.delta_bias))
    final, initial = ((0, 0, 0) if x is None else x.stride() for x in (call.grad_final, grads.initial))
    return (D, bias, *final, *initial)


def flags_of(call: ScanBackward, grads: ScanGradients) -> dict[str, bool]:
    """Constants of both kernels that say which tensors there are."""
    return {
        "VARLEN": call.query_start_loc is not None,
        "HAS_D": call.D is not None,
        "HAS_Z": call.z is not None,
        "HAS_BIAS": call.delta_bias is not None,
        "SOFTPLUS": call.delta_softplus,
        "HAS_FINAL": call.grad_final is not None,
        "HAS_INITIAL": grads.initial is not None,
    }
