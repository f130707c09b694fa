"""What a mixer does between x_proj and out_proj: time steps, the recurrence, the D skip and the gate.

:class:`TimeSteps` owns the weights of it, dt_proj, ``A`` and ``D``, and offers two calls, one that scans sequences and
one that advances each sequence by a token. Here is where ``A_log`` is loaded.
"""

from __future__ import annotations

import torch
from torch import nn

from tp_mamba.batch import NULL_SLOT, MambaMetadata, split_batch_to_prefill_and_decode
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.kernels.dt_proj_state_update import dt_proj_state_update
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.selective_scan import selective_scan, selective_scan_fn
from tp_mamba.kernels.selective_state_update import selective_state_update
from tp_mamba.layers.init import initialize
from tp_mamba.layers.linear import ColumnParallelLinear
from tp_mamba.layers.weights import for_activations
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard


class TimeSteps(ShardedModule):
    """dt_proj, ``A`` and ``D`` of a mixer, cut by channel, and what is computed with them.

    It is a base class of the mixer and not a child of it, so that its tensors are ``mixer.A``, ``mixer.D`` and
    ``mixer.dt_proj.weight`` in checkpoints, ``state_dict()`` and ``named_parameters()`` alike.
    """

    dt_proj: ColumnParallelLinear
    A: nn.Parameter
    """``[D/n, N]``; not there in training, see :meth:`decay_rates`."""
    D: nn.Parameter
    A_log: torch.Tensor
    """``[D/n, N]``: a parameter in training, else what was loaded, for saving."""
    trainable: bool

    def add_dt_proj(
        self,
        channels: int,
        time_step_rank: int,
        *,
        weight_kind: str,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device | str | None,
        prefix: str,
    ) -> None:
        """Build dt_proj ``[D/n, R]`` with its bias, which stays out of the product: it is added in float32."""
        self.dt_proj = ColumnParallelLinear(
            time_step_rank,
            channels,
            skip_bias_add=True,
            bias_in_float32=True,
            weight_kind=weight_kind,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix=prefix,
        )

    def add_recurrence(
        self,
        channels: int,
        state_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None,
        trainable: bool,
    ) -> None:
        """Build ``A [D/n, N]``, or ``A_log`` to derive it from, and ``D [D/n]`` in at least float32."""
        self.trainable = trainable
        shape = (channels, state_size)
        if trainable:
            self.add_parameter("A_log", Shard(shape=shape, dim=0, wide=True), dtype=dtype, device=device)
        else:
            self.shards["A"] = Shard(shape=shape, dim=0, wide=True, sources=("A_log",))
            local, _ = self.shards["A"].local_shape(self.tp.size)
            # Stored with the channels contiguous, as the states are: the scan then reads both in whole rows.
            self.A = nn.Parameter(torch.empty(state_size, local, dtype=wide_dtype(dtype), device=device).t())
            # exp cannot be undone to the bit: the file's own values are kept for saving.
            self.register_buffer("A_log", torch.empty_like(self.A, requires_grad=False), persistent=False)
        self.add_parameter("D", Shard(shape=(channels,), dim=0, wide=True), dtype=dtype, device=device)

    def decay_rates(self) -> torch.Tensor:
        """``A [D/n, N]``, channels contiguous: the parameter, or in training ``-exp(A_log)``, computed at each call."""
        return -torch.exp(self.A_log.t().contiguous()).t() if self.trainable else self.A

    def reset_time_steps(self) -> None:
        """Initial values as in mamba_ssm's ``Mamba.__init__``.

        dt starts log-uniform over [1e-3, 0.1] (at least 1e-4) through the softplus, A_log at log(1..N), D at 1.
        Drawn for the full tensors, so the same seed gives the same model at every rank count.
        """
        self.dt_proj.reset_weight()

        def draw_dt_bias(full: torch.Tensor) -> None:
            low, high = 1e-3, 1e-1
            dt = (low * (high / low) ** torch.rand_like(full)).clamp_(min=1e-4)
            full.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

        initialize(self.dt_proj, "bias", draw_dt_bias)
        states = torch.arange(1, self.A_log.shape[1] + 1, dtype=torch.float64, device="cpu")
        held = "A_log" if self.trainable else "A"
        initialize(self, held, lambda full: full.copy_(states.log().to(full.device)))
        initialize(self, "D", lambda full: full.fill_(1.0))

    def load_shard(self, name: str, local: torch.Tensor) -> None:
        """As ShardedModule, but ``A`` from this rank's ``A_log``: ``A = -exp(A_log)``, both in ``A``'s dtype."""
        if name != "A":
            super().load_shard(name, local)
            return
        with torch.no_grad():
            self.A_log.copy_(local)
            self.A.copy_(-torch.exp(self.A_log))

    def read_shard(self, name: str) -> torch.Tensor:
        """As ShardedModule, but ``A`` as ``A_log``: what was loaded, unless ``A`` has been changed since."""
        if name != "A":
            return super().read_shard(name)
        A = self.A.detach()
        return self.A_log if torch.equal(-torch.exp(self.A_log), A) else torch.log(-A)

    def wide_tensors(self) -> list[torch.Tensor]:
        """As ShardedModule, and ``A_log``."""
        return list({id(tensor): tensor for tensor in (*super().wide_tensors(), self.A_log)}.values())

    def advance(
        self,
        u_TD: torch.Tensor,
        z_TD: torch.Tensor,
        dt_TR: torch.Tensor,
        B_TN: torch.Tensor,
        C_TN: torch.Tensor,
        batch: MambaMetadata,
        ssm_state: torch.Tensor | None,
    ) -> torch.Tensor:
        """Time steps, recurrence, D skip and gate of a packed batch.

        Args:
            u_TD, z_TD: ``[T, D/n]``, the convolved inputs and the gates; channels contiguous.
            dt_TR: ``[T, R]``, what dt_proj maps to time steps.
            B_TN, C_TN: ``[T, N]``.
            batch: what the tokens are.
            ssm_state: ``[slots, D/n, N]``, read and updated in place; None where the batch names no slot.

        Returns:
            ``y [T, D/n]``, contiguous.
        """
        y_TD = torch.empty_like(u_TD)
        if not batch.num_prefills:
            return self.step(u_TD, z_TD, dt_TR, B_TN, C_TN, batch, ssm_state, out=y_TD)
        if not batch.num_padded_decodes:
            return self.scan(u_TD, z_TD, dt_TR, B_TN, C_TN, batch, ssm_state, out=y_TD)
        parts, cut = split_batch_to_prefill_and_decode(u_TD, z_TD, batch), batch.num_padded_decodes
        decodes = (parts.hidden_states_BC_d, parts.gate_d, dt_TR[:cut], B_TN[:cut], C_TN[:cut])
        prefills = (parts.hidden_states_BC_p, parts.gate_p, dt_TR[cut:], B_TN[cut:], C_TN[cut:])
        self.step(*decodes, batch, ssm_state, out=y_TD[:cut])
        self.scan(*prefills, batch, ssm_state, out=y_TD[cut:])
        return y_TD

    def step(
        self,
        u_TD: torch.Tensor,
        z_TD: torch.Tensor,
        dt_TR: torch.Tensor,
        B_TN: torch.Tensor,
        C_TN: torch.Tensor,
        batch: MambaMetadata,
        ssm_state: torch.Tensor | None,
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """One token of each decode row of ``batch``, into ``out``: in one kernel where dt_proj's weight is dense."""
        if ssm_state is None:  # no rows
            return out
        dt_proj = self.dt_proj
        weight = dt_proj.dense_weight()
        if weight is not None:
            dt_proj_state_update(
                ssm_state,
                u_TD,
                dt_TR,
                for_activations(weight, dt_TR),
                dt_proj.bias,
                self.decay_rates(),
                B_TN,
                C_TN,
                self.D,
                z_TD,
                batch.decode_state_indices,
                pad_slot_id=NULL_SLOT,
                out=out,
            )
            return out
        selective_state_update(
            ssm_state,
            u_TD,
            dt_proj.local_product(dt_TR),
            self.decay_rates(),
            B_TN,
            C_TN,
            self.D,
            z_TD,
            dt_proj.bias,
            True,
            batch.decode_state_indices,
            pad_slot_id=NULL_SLOT,
            out=out,
        )
        return out

    def scan(
        self,
        u_TD: torch.Tensor,
        z_TD: torch.Tensor,
        dt_TR: torch.Tensor,
        B_TN: torch.Tensor,
        C_TN: torch.Tensor,
        batch: MambaMetadata,
        ssm_state: torch.Tensor | None,
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The tokens of the prefills of ``batch``, into ``out``."""
        delta_TD = self.time_steps(dt_TR)
        dt_bias = None if self._softplus_is_applied else self.dt_proj.bias
        stateful = ssm_state is not None
        selective_scan_fn(
            u_TD.t(),
            delta_TD.t(),
            self.decay_rates(),
            B_TN.t(),
            C_TN.t(),
            self.D,
            z_TD.t(),
            dt_bias,
            dt_bias is not None,
            query_start_loc=batch.prefill_query_start_loc,
            cache_indices=batch.prefill_state_indices if stateful else None,
            has_initial_state=batch.prefill_has_initial_states if stateful else None,
            ssm_states=ssm_state,
            pad_slot_id=NULL_SLOT,
            out=out.t(),
        )
        return out

    def time_steps(self, dt_TR: torch.Tensor) -> torch.Tensor:
        """``dt_TR`` through dt_proj: ``[T, D/n]``, after bias and softplus where the weight is dense, else before."""
        weight = self.dt_proj.dense_weight()
        if weight is None:
            return self.dt_proj.local_product(dt_TR)
        return linear_softplus(dt_TR, for_activations(weight, dt_TR), self.dt_proj.bias)

    @property
    def _softplus_is_applied(self) -> bool:
        return self.dt_proj.dense_weight() is not None

    def scan_sequences(
        self,
        u_TD: torch.Tensor,
        z_TD: torch.Tensor,
        delta_TD: torch.Tensor,
        B_TN: torch.Tensor,
        C_TN: torch.Tensor,
        batch: MambaMetadata,
        initial_SDN: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`scan` for a batch of prefills, with gradients: states come and go as values.

        Args:
            delta_TD: what :meth:`time_steps` gives.
            initial_SDN: ``[S, D/n, N]``, the state before each sequence.

        Returns:
            ``y [T, D/n]``, and where there are initial states the states after each sequence ``[S, D/n, N]``.
        """
        dt_bias = None if self._softplus_is_applied else self.dt_proj.bias
        result = selective_scan(
            u_TD.t(),
            delta_TD.t(),
            self.decay_rates(),
            B_TN.t(),
            C_TN.t(),
            self.D,
            z_TD.t(),
            dt_bias,
            dt_bias is not None,
            query_start_loc=batch.prefill_query_start_loc,
            initial_states=initial_SDN,
            return_final_states=initial_SDN is not None,
        )
        y_DT, final_SDN = result if isinstance(result, tuple) else (result, None)
        return y_DT.t(), final_SDN
