"""The checked arguments of one call, as the op hands them to whichever implementation serves it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tp_mamba.kernels.common.dtypes import wide_dtype


class SelectiveScan(NamedTuple):
    """Arguments of the op ``tp_mamba::selective_scan``, in its order; the public function explains most."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    """``[B, G, N, L]`` or ``[G, N, T]``."""
    C: torch.Tensor
    """As B, with the same number of groups."""
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool
    query_start_loc: torch.Tensor | None
    """``[S + 1]`` contiguous; None for a dense batch."""
    cache_indices: torch.Tensor | None
    """``[S]`` contiguous."""
    has_initial_state: torch.Tensor | None
    """``[S]`` contiguous."""
    ssm_states: torch.Tensor | None
    last_state: torch.Tensor | None
    """``[S, D, N]`` contiguous, written."""
    pad_slot_id: int
    out: torch.Tensor
    saved_states: torch.Tensor | None = None
    """``[B, ceil(L / k), N, D]``, packed ``[rows, N, D]``; contiguous, written."""
    save_states_every: int = 1
    """``k``: the tokens from one saved state to the next."""

    @property
    def sequences(self) -> int:
        """S, or the batch of a dense call."""
        starts = self.query_start_loc
        return self.u.shape[0] if starts is None else starts.shape[0] - 1


class ScanBackward(NamedTuple):
    """Arguments of the op ``tp_mamba::selective_scan_backward``, in its order; most are those of the forward."""

    grad_out: torch.Tensor
    """Shape of ``u``, any strides."""
    grad_final: torch.Tensor | None
    """``[S, D, N]``; None for zeros."""
    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    saved_states: torch.Tensor
    """``[B, ceil(L / save_every), N, D]``, packed ``[rows, N, D]``; contiguous."""
    delta_softplus: bool
    query_start_loc: torch.Tensor | None
    save_every: int
    has_initial: bool
    """Whether the gradient of the initial states is wanted."""

    @property
    def sequences(self) -> int:
        """S, or the batch of a dense call."""
        starts = self.query_start_loc
        return self.u.shape[0] if starts is None else starts.shape[0] - 1

    def gradients(self) -> ScanGradients:
        """Tensors to write the gradients to."""
        (channels, n), dtype = self.A.shape, wide_dtype(self.u.dtype)
        initial = self.u.new_empty(self.sequences, n, channels, dtype=dtype).mT if self.has_initial else None
        like = torch.empty_like
        return ScanGradients(
            like(self.u), like(self.delta), like(self.A), like(self.B), like(self.C),
            None if self.D is None else like(self.D), None if self.z is None else like(self.z),
            None if self.delta_bias is None else like(self.delta_bias),
            initial,
        )  # fmt: skip


class ScanGradients(NamedTuple):
    """The gradients of a scan's inputs, in the order in which the op returns those that there are."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    initial: torch.Tensor | None
    """In float32, or float64."""
