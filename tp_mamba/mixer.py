"""The Mamba-1 mixer, tensor-parallel over its inner channels.

Letters, here and in every shape and tensor-name suffix of this package: ``B`` batch, ``L`` length, ``T`` packed
tokens, ``S`` sequences, ``H`` hidden size, ``D`` inner channels (``intermediate_size``), ``N`` state size, ``R``
time step rank, ``K`` convolution width, ``n`` tensor-parallel ranks. ``D`` in a shape is the logical size; a rank
holds ``D/n`` of it, rounded up.

What is cut where, and what is communicated::

    parameter              held by a rank     forward              backward
    in_proj   [2D, H]      x and z rows       -                    all-reduce of dh
    conv1d    [D, 1, K]    rows               -                    -
    x_proj    [R+2N, D]    columns            all-reduce, float32  all-reduce of dB and dC
    dt_proj   [D, R]       rows               -                    all-reduce of d(dt)
    A, D      [D, N], [D]  rows               -                    -
    out_proj  [H, D]       columns            all-reduce           -

Mamba-1 allows this because after x_proj every channel is independent (arXiv:2312.00752, algorithm 2); the split
is that of vLLM's mixer of the same name. The gradient all-reduce of dt, B and C stands after their norms, on what
dt_proj and the scan consume, so the norm weights get whole gradients on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from tp_mamba.batch import (
    NULL_SLOT,
    MambaMetadata,
    MambaMetadataBuilder,
    split_batch_to_prefill_and_decode,
)
from tp_mamba.kernels.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from tp_mamba.kernels.dt_proj_state_update import dt_proj_state_update
from tp_mamba.kernels.linear_softplus import linear_softplus
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.split_dt_bc import split_dt_bc
from tp_mamba.layers.conv import ColumnParallelConv1d
from tp_mamba.layers.init import initialize, uniform
from tp_mamba.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from tp_mamba.layers.norm import RMSNorm
from tp_mamba.layers.state_spec import StateSpec
from tp_mamba.options import resolve_dtype
from tp_mamba.parallel.collectives import copy_to_tp
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard


class MambaState(NamedTuple):
    """One layer's recurrent state, a row for each slot; updated in place."""

    conv_state: torch.Tensor
    """``[slots, D/n, K-1]``: the last K-1 inputs of the convolution, newest last."""
    ssm_state: torch.Tensor
    """``[slots, D/n, N]``"""


class MambaMixer(ShardedModule):
    """``[.., H] -> [.., H]``: in_proj, causal convolution, selective scan, gate, out_proj.

    Argument names and attributes are those of vLLM's ``MambaMixer``. Parameters take no gradients: the kernels
    have no backward, and one of them refuses an input that requires a gradient.
    """

    def __init__(
        self,
        hidden_size: int,
        ssm_state_size: int,
        conv_kernel_size: int,
        intermediate_size: int,
        time_step_rank: int,
        use_conv_bias: bool,
        use_bias: bool,
        use_rms_norm: bool,
        rms_norm_has_weight: bool = True,
        rms_norm_eps: float = 1e-5,
        activation: str = "silu",
        is_lora_enabled: bool = False,
        model_config: Any = None,
        cache_config: Any = None,
        prefix: str = "",
        *,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Build rank ``tp.rank``'s part.

        Args:
            hidden_size: ``H``.
            ssm_state_size: ``N``, 1 to 256.
            conv_kernel_size: ``K``, 2 to 4.
            intermediate_size: ``D`` of the full layer; need not be a multiple of the number of ranks.
            time_step_rank: ``R``.
            use_conv_bias: whether the convolution has a bias.
            use_bias: whether in_proj and out_proj have one.
            use_rms_norm: RMSNorm of dt, B and C after x_proj (Jamba, FalconMamba).
            rms_norm_has_weight: whether those norms have weights (Jamba) or not (FalconMamba).
            rms_norm_eps: their epsilon.
            activation: ``"silu"`` or ``"swish"``, which are the same.
            is_lora_enabled: adapters on the projections; not available yet, refused when set.
            model_config: object with ``dtype``, the dtype of parameters and conv state unless ``dtype`` is given.
            cache_config: object with the attributes of :class:`tp_mamba.options.CacheConfig`.
            prefix: this layer's name in checkpoints and messages, such as ``backbone.layers.3.mixer``.
            tp: the ranks; one rank by default.
            dtype: dtype of the parameters; ``A``, ``D`` and the dt bias stay float32 (float64 with float64).
            device: where the parameters live.

        Raises:
            ValueError: a size out of range, more ranks than channels, an unknown activation or dtype, or an
                option whose feature is not available.
        """
        super().__init__(tp, prefix)
        tp = self.tp
        name = prefix or "MambaMixer"
        _check_sizes(name, H=hidden_size, D=intermediate_size, R=time_step_rank)
        _check_options(name, ssm_state_size, activation, is_lora_enabled, cache_config)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.ssm_state_size, self.conv_kernel_size = ssm_state_size, conv_kernel_size
        self.time_step_rank, self.activation = time_step_rank, activation
        self.use_rms_norm = use_rms_norm
        asked = dtype or getattr(model_config, "dtype", None) or torch.get_default_dtype()
        self.dtype = resolve_dtype(asked, None, f"{name}: dtype")
        # exp and softplus amplify rounding: A, D, the dt bias and what feeds them are never held below float32.
        self.wide_dtype = torch.promote_types(self.dtype, torch.float32)
        self._state_dtype = (
            resolve_dtype(
                getattr(cache_config, "mamba_cache_dtype", "auto"), self.dtype, "mamba_cache_dtype"
            ),
            resolve_dtype(
                getattr(cache_config, "mamba_ssm_cache_dtype", "auto"),
                self.wide_dtype,
                "mamba_ssm_cache_dtype",
            ),
        )

        def named(child: str) -> dict[str, Any]:
            return {
                "tp": tp,
                "dtype": self.dtype,
                "device": device,
                "prefix": f"{prefix}.{child}".lstrip("."),
            }

        D, N, R = intermediate_size, ssm_state_size, time_step_rank
        self.in_proj = MergedColumnParallelLinear(hidden_size, [D, D], bias=use_bias, **named("in_proj"))
        self.conv1d = ColumnParallelConv1d(D, conv_kernel_size, bias=use_conv_bias, **named("conv1d"))
        self.x_proj = RowParallelLinear(D, R + 2 * N, bias=False, reduce_in_float32=True, **named("x_proj"))
        # The bias stays out of the layer: linear_softplus adds it in float32, before the softplus.
        self.dt_proj = ColumnParallelLinear(
            R, D, skip_bias_add=True, bias_in_float32=True, **named("dt_proj")
        )
        self.out_proj = RowParallelLinear(D, hidden_size, bias=use_bias, **named("out_proj"))
        self.intermediate_size_local = self.conv1d.weight.shape[0]
        self._make_ssm_parameters(device)

        self.dt_layernorm = self.b_layernorm = self.c_layernorm = None
        if use_rms_norm:
            eps, weighted = rms_norm_eps, rms_norm_has_weight
            self.dt_layernorm = RMSNorm(R, eps, weighted, **named("dt_layernorm"))
            self.b_layernorm = RMSNorm(N, eps, weighted, **named("b_layernorm"))
            self.c_layernorm = RMSNorm(N, eps, weighted, **named("c_layernorm"))
        self.requires_grad_(False)
        self.reset_parameters()

    def _make_ssm_parameters(self, device: torch.device | str | None) -> None:
        """``A [D/n, N]`` and ``D [D/n]``, with the split of the checkpoint's ``A_log`` and ``D``."""
        local, N = self.intermediate_size_local, self.ssm_state_size
        self.shards["A"] = Shard(shape=(self.intermediate_size, N), dim=0, wide=True, sources=("A_log",))
        # Stored with the channels contiguous, as the states are: the scan then reads both in whole rows.
        self.A = nn.Parameter(torch.empty(N, local, dtype=self.wide_dtype, device=device).t())
        # exp cannot be undone to the bit: the file's own values are kept for saving.
        self.A_log: torch.Tensor
        self.register_buffer("A_log", torch.empty_like(self.A, requires_grad=False), persistent=False)
        shard = Shard(shape=(self.intermediate_size,), dim=0, wide=True)
        self.D = self.add_parameter("D", shard, dtype=self.wide_dtype, device=device)

    def load_shard(self, name: str, local: torch.Tensor) -> None:
        """As ShardedModule, but ``A`` from this rank's ``A_log``: ``A = -exp(A_log)``, both in ``wide_dtype``."""
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

    def reset_parameters(self) -> None:
        """Initial values of dt_proj, A and D as in mamba_ssm's ``Mamba.__init__``; the layers set their own.

        dt starts log-uniform over [1e-3, 0.1] (at least 1e-4) through the softplus, A_log at log(1..N), D at 1.
        Drawn for the full tensors, so the same seed gives the same model at every rank count.
        """
        initialize(self.dt_proj, "weight", uniform(self.time_step_rank**-0.5))

        def draw_dt_bias(full: torch.Tensor) -> None:
            low, high = 1e-3, 1e-1
            dt = (low * (high / low) ** torch.rand_like(full)).clamp_(min=1e-4)
            full.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

        initialize(self.dt_proj, "bias", draw_dt_bias)
        states = torch.arange(1, self.ssm_state_size + 1, dtype=torch.float64, device="cpu")
        initialize(self, "A", lambda full: full.copy_(states.log().to(full.device)))
        initialize(self, "D", lambda full: full.fill_(1.0))

    def forward(
        self,
        hidden_states: torch.Tensor,
        metadata: MambaMetadata | None = None,
        state: MambaState | None = None,
    ) -> torch.Tensor:
        """Mix the tokens of each sequence; two all-reduces, whatever the batch is made of.

        Args:
            hidden_states: packed ``[T, H]``, decode tokens first, or dense ``[B, L, H]``, replicated.
            metadata: what the ``T`` (or ``B * L``) tokens are. None: each row of a dense batch, or all of a
                packed one, is one sequence from its beginning, and no state is kept.
            state: this layer's slots, read and updated in place where ``metadata`` names one.

        Returns:
            The same shape and dtype, replicated.

        Raises:
            ValueError: shapes or dtypes that do not fit, or slots named that ``state`` does not have.
            RuntimeError: ``hidden_states`` requires a gradient in grad mode: the kernels have no backward.
        """
        shape = hidden_states.shape
        metadata = self._check_inputs(hidden_states, metadata, state)
        h_TH = hidden_states.reshape(-1, self.hidden_size)

        x_TD, z_TD = self.in_proj(h_TH).chunk(2, dim=-1)
        u_TD = self._convolve(x_TD, z_TD, metadata, state)
        dt_TR, B_TN, C_TN = self._project_time_steps(u_TD)
        y_TD = self._scan(u_TD, z_TD, copy_to_tp(dt_TR, self.tp), B_TN, C_TN, metadata, state)
        return self.out_proj(y_TD).view(shape)

    def _convolve(
        self, x_TD: torch.Tensor, z_TD: torch.Tensor, metadata: MambaMetadata, state: MambaState | None
    ) -> torch.Tensor:
        """``silu(conv(x))``, decode rows from their window, prefills along their length."""
        u_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        batch = split_batch_to_prefill_and_decode(x_TD, z_TD, metadata)
        conv_state = None if state is None else state.conv_state
        weight_DK, cut = self.conv1d.weight.squeeze(1), metadata.num_padded_decodes
        if cut:
            assert conv_state is not None  # _check_inputs has seen to it
            causal_conv1d_update(
                batch.hidden_states_BC_d,
                conv_state,
                weight_DK,
                self.conv1d.bias,
                self.activation,
                conv_state_indices=batch.state_indices_tensor_d,
                pad_slot_id=NULL_SLOT,
                out=u_TD[:cut],
            )
        if metadata.num_prefills:
            causal_conv1d_fn(
                batch.hidden_states_BC_p.t(),
                weight_DK,
                self.conv1d.bias,
                activation=self.activation,
                query_start_loc=batch.query_start_loc_p,
                cache_indices=None if conv_state is None else batch.state_indices_tensor_p,
                has_initial_state=None if conv_state is None else batch.has_initial_states_p,
                conv_states=conv_state,
                pad_slot_id=NULL_SLOT,
                out=u_TD[cut:].t(),
            )
        return u_TD

    def _project_time_steps(self, u_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``dt [T, R]`` in the model's dtype, ``B`` and ``C [T, N]`` in float32; the one reduce of x_proj."""
        x_dbl = self.x_proj(u_TD, in_slices=True)
        norms = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
        dt_weight, b_weight, c_weight = (None if norm is None else norm.weight for norm in norms)
        dt_TR, B_TN, C_TN = split_dt_bc(
            x_dbl,
            self.time_step_rank,
            self.ssm_state_size,
            dt_weight=dt_weight,
            b_weight=b_weight,
            c_weight=c_weight,
            eps=None if self.dt_layernorm is None else self.dt_layernorm.eps,
            dt_dtype=self.dtype,
        )
        return dt_TR, copy_to_tp(B_TN, self.tp), copy_to_tp(C_TN, self.tp)

    def _scan(
        self,
        u_TD: torch.Tensor,
        z_TD: torch.Tensor,
        dt_TR: torch.Tensor,
        B_TN: torch.Tensor,
        C_TN: torch.Tensor,
        metadata: MambaMetadata,
        state: MambaState | None,
    ) -> torch.Tensor:
        """dt_proj and softplus, the recurrence, the D skip and the gate: ``y [T, D/n]``."""
        y_TD = torch.empty_like(u_TD)
        batch = split_batch_to_prefill_and_decode(u_TD, z_TD, metadata)
        ssm_state, cut = None if state is None else state.ssm_state, metadata.num_padded_decodes
        if cut:
            assert ssm_state is not None
            dt_proj_state_update(
                ssm_state,
                batch.hidden_states_BC_d,
                dt_TR[:cut],
                self.dt_proj.weight,
                self.dt_proj.bias,
                self.A,
                B_TN[:cut],
                C_TN[:cut],
                self.D,
                batch.gate_d,
                state_batch_indices=batch.state_indices_tensor_d,
                pad_slot_id=NULL_SLOT,
                out=y_TD[:cut],
            )
        if metadata.num_prefills:
            delta_TD = linear_softplus(dt_TR[cut:], self.dt_proj.weight, self.dt_proj.bias)
            selective_scan_fn(
                batch.hidden_states_BC_p.t(),
                delta_TD.t(),
                self.A,
                B_TN[cut:].t(),
                C_TN[cut:].t(),
                self.D,
                batch.gate_p.t(),
                query_start_loc=batch.query_start_loc_p,
                cache_indices=None if ssm_state is None else batch.state_indices_tensor_p,
                has_initial_state=None if ssm_state is None else batch.has_initial_states_p,
                ssm_states=ssm_state,
                pad_slot_id=NULL_SLOT,
                out=y_TD[cut:].t(),
            )
        return y_TD

    def _check_inputs(
        self, hidden_states: torch.Tensor, metadata: MambaMetadata | None, state: MambaState | None
    ) -> MambaMetadata:
        """Refuse what cannot be mixed, and describe a batch that came without metadata."""
        name, shape = self.prefix or "MambaMixer", list(hidden_states.shape)
        if hidden_states.dim() not in (2, 3) or shape[-1] != self.hidden_size:
            raise ValueError(
                f"{name}: got hidden states of shape {shape}, expected packed [T, {self.hidden_size}] or "
                f"dense [B, L, {self.hidden_size}]"
            )
        if hidden_states.dtype != self.in_proj.weight.dtype:
            raise ValueError(
                f"{name}: got hidden states in {hidden_states.dtype}, the parameters are in "
                f"{self.in_proj.weight.dtype}: convert one of them"
            )
        if self.A.dtype != self.wide_dtype:
            raise ValueError(
                f"{name}: A is in {self.A.dtype} but must stay in {self.wide_dtype}: build the mixer with dtype=... "
                "instead of casting it afterwards"
            )
        if metadata is None:
            B, L = (1, shape[0]) if hidden_states.dim() == 2 else (shape[0], shape[1])
            B = B if L else 0  # sequences without tokens need no row
            metadata = MambaMetadataBuilder(hidden_states.device).build(
                prefill_slots=[NULL_SLOT] * B, prefill_lengths=[L] * B, has_initial_states=[False] * B
            )
        elif state is None and metadata.num_padded_decodes:
            raise ValueError(
                f"{name}: the batch has {metadata.num_padded_decodes} decode rows but no state was passed: decoding "
                "continues a state, so pass the layer's slots"
            )
        elif state is None and metadata.max_slot != NULL_SLOT:
            raise ValueError(
                f"{name}: slots are named but no state was passed: pass the layer's slots, or NULL_SLOT"
            )
        if state is not None and metadata.max_slot >= state.ssm_state.shape[0]:
            raise ValueError(
                f"{name}: the batch names slot {metadata.max_slot} of a state with {state.ssm_state.shape[0]} slots: "
                "pass slots that the cache's allocate() returned"
            )
        return metadata

    def get_state_shape(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """One slot's ``(conv_state [D/n, K-1], ssm_state [D/n, N])`` on this rank, D rounded up to ranks."""
        local = self.intermediate_size_local
        return (local, self.conv_kernel_size - 1), (local, self.ssm_state_size)

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of ``(conv_state, ssm_state)``: by default the model's, and float32."""
        return self._state_dtype

    state_type = MambaState
    """What :meth:`forward` takes as its state, made of the tensors of :meth:`state_spec`."""

    def state_spec(self) -> tuple[StateSpec, ...]:
        """What a sequence's state consists of, in the order of :class:`MambaState`."""
        D, window, N = self.intermediate_size, self.conv_kernel_size - 1, self.ssm_state_size
        conv_dtype, ssm_dtype = self.get_state_dtype()
        # The channels are contiguous, which is how the kernels read and write both.
        return (
            StateSpec(name="conv_state", shape=(D, window), dtype=conv_dtype, dim=0, contiguous=0),
            StateSpec(name="ssm_state", shape=(D, N), dtype=ssm_dtype, dim=0, contiguous=0),
        )

    @property
    def mamba_type(self) -> str:
        """``"mamba1"``"""
        return "mamba1"

    def get_attn_backend(self) -> type[MambaMetadataBuilder]:
        """The class that builds a packed batch's metadata from the requests in it."""
        return MambaMetadataBuilder

    def extra_repr(self) -> str:
        return f"H={self.hidden_size}, D={self.intermediate_size}, N={self.ssm_state_size}, tp={self.tp}"


def _check_sizes(name: str, **sizes: int) -> None:
    for letter, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: size {letter} is {size!r}, it must be a positive integer")


def _check_options(
    name: str, ssm_state_size: int, activation: str, is_lora_enabled: bool, cache_config: Any
) -> None:
    if not 1 <= ssm_state_size <= 256:
        raise ValueError(f"{name}: got a state size of {ssm_state_size}, the kernels serve 1 to 256")
    if activation not in ("silu", "swish"):
        raise ValueError(
            f'{name}: unknown activation {activation!r}, Mamba-1 uses "silu" (also called "swish")'
        )
    if is_lora_enabled:
        raise ValueError(
            f"{name}: is_lora_enabled is set but adapters are not available yet: merge the adapter into the "
            "checkpoint and leave it False"
        )
    if getattr(cache_config, "enable_prefix_caching", False):
        raise ValueError(
            f"{name}: cache_config.enable_prefix_caching is set but reuse of prefixes is not available yet: leave "
            "it False"
        )
    block_size = getattr(cache_config, "mamba_block_size", None)
    if block_size is not None:
        raise ValueError(
            f"{name}: cache_config.mamba_block_size is {block_size} but states kept for prefix reuse are not "
            "available yet: leave it None"
        )
