"""The scan of :class:`~benchmarks.inputs.StateSpace`, a mixer, a block and a model, from the kernels' references.

With ``dtype=torch.float64`` (the scan always) they give the answer. In the dtype of the parameters every intermediate
tensor is rounded where the package's own may be: the distance between the two measures what rounding alone costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.inputs import StateSpace
from tp_mamba.kernels.causal_conv1d.reference import causal_conv1d_reference
from tp_mamba.kernels.linear_softplus.reference import linear_softplus_reference
from tp_mamba.kernels.rms_norm.reference import add_rms_norm_reference
from tp_mamba.kernels.selective_scan.reference import selective_scan_reference
from tp_mamba.kernels.split_dt_bc.reference import split_dt_bc_reference
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.mixer import MambaMixer, MambaState
from tp_mamba.model import MambaForCausalLM


def _in(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``x`` in float64 where that is asked for, else as it is."""
    return x.double() if x is not None and dtype == torch.float64 else x


def _product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


def scan_reference(
    x: StateSpace,
    query_start_loc: torch.Tensor,
    *,
    channels: torch.Tensor | slice = slice(None),
    device: torch.device | str | None = None,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    ssm_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out [D, T], last_state [S, D, N])`` of ``x`` in float64.

    Args:
        channels: which of them; each is independent of the others.
        device: where to compute; by default where ``x`` is.
        query_start_loc, cache_indices, has_initial_state, ssm_states: as for the scan itself.
    """

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device or tensor.device).double()

    out, last_state = selective_scan_reference(
        wide(x.u[:, channels].t()),
        wide(x.delta[:, channels].t()),
        wide(x.A[channels]),
        wide(x.B.t()),
        wide(x.C.t()),
        wide(x.D[channels]),
        wide(x.z[:, channels].t()),
        None if x.delta_bias is None else wide(x.delta_bias[channels]),
        x.delta_softplus,
        query_start_loc=query_start_loc,
        cache_indices=cache_indices,
        has_initial_state=has_initial_state,
        ssm_states=ssm_states,
    )
    return out, last_state


def mixer_reference(
    mixer: MambaMixer,
    h_TH: torch.Tensor,
    query_start_loc: torch.Tensor,
    state: MambaState | None,
    *,
    continues: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What ``mixer`` computes for packed ``h [T, H]``, in ``dtype``; sequence ``s`` has slot ``s``.

    Args:
        query_start_loc: ``[S + 1]``; a decode step is a batch of sequences of one token.
        state: read if ``continues``, and advanced in place; None keeps none.
        continues: whether the sequences go on from ``state``.
        dtype: float64, or the dtype of the parameters.
    """
    sequences = query_start_loc.shape[0] - 1
    initial = torch.full((sequences,), continues, device=h_TH.device)
    x_TD, z_TD = _product(h_TH, mixer.in_proj.weight, dtype).chunk(2, dim=1)
    u_TD = causal_conv1d_reference(
        x_TD.t(),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.activation,
        conv_states=None if state is None else state.conv_state,
        has_initial_state=None if state is None else initial,
        query_start_loc=query_start_loc,
    ).t()
    dt_weight, b_weight, c_weight = (
        _in(None if norm is None else norm.weight, dtype)
        for norm in (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
    )
    dt_TR, B_TN, C_TN = split_dt_bc_reference(
        _product(u_TD, mixer.x_proj.weight, dtype),
        mixer.time_step_rank,
        mixer.ssm_state_size,
        eps=None if mixer.dt_layernorm is None else mixer.dt_layernorm.eps,
        dt_weight=dt_weight,
        b_weight=b_weight,
        c_weight=c_weight,
    )
    delta_TD = linear_softplus_reference(
        dt_TR, mixer.dt_proj.weight.to(dtype), _in(mixer.dt_proj.bias, dtype)
    )
    y_DT, _ = selective_scan_reference(
        u_TD.t(),
        delta_TD.t(),
        mixer.A,
        B_TN.t(),
        C_TN.t(),
        mixer.D,
        z_TD.t(),
        ssm_states=None if state is None else state.ssm_state,
        has_initial_state=None if state is None else initial,
        query_start_loc=query_start_loc,
    )
    return _product(y_DT.t(), mixer.out_proj.weight, dtype)


def block_reference(
    norm: RMSNorm,
    mixer: MambaMixer,
    h_TH: torch.Tensor,
    residual_TH: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    state: MambaState | None,
    *,
    continues: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(h, residual)`` after one block: residual add, norm and mixer; arguments as :func:`mixer_reference`."""
    normed_TH, residual_TH = add_rms_norm_reference(
        h_TH.to(dtype), _in(residual_TH, dtype), _in(norm.weight, dtype), norm.eps
    )
    h_TH = mixer_reference(mixer, normed_TH, query_start_loc, state, continues=continues, dtype=dtype)
    return h_TH, residual_TH


def model_reference(model: MambaForCausalLM, ids_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The logits ``[T, V]`` of one sequence, from its beginning."""
    loc = torch.tensor([0, ids_T.shape[0]], device=ids_T.device)
    h_TH, residual_TH = F.embedding(ids_T, model.backbone.embeddings.weight).to(dtype), None
    for block in model.backbone.layers:
        h_TH, residual_TH = block_reference(
            block.norm,  # type: ignore[arg-type]
            block.mixer,  # type: ignore[arg-type]
            h_TH,
            residual_TH,
            loc,
            None,
            continues=False,
            dtype=dtype,
        )
    norm_f = model.backbone.norm_f
    h_TH, _ = add_rms_norm_reference(h_TH, residual_TH, _in(norm_f.weight, dtype), norm_f.eps)
    return _product(h_TH, model.lm_head.weight, dtype)


def state_like(state: MambaState, dtype: torch.dtype) -> MambaState:
    """A copy of ``state``, in float64 where that is ``dtype``."""
    return MambaState(*(s.to(dtype, copy=True) if dtype == torch.float64 else s.clone() for s in state))
