"""The Mamba-1 mixer, tensor-parallel over its inner channels.

Letters, here and in every shape and tensor-name suffix of this package: ``B`` batch, ``L`` length, ``T`` packed
tokens, ``S`` sequences, ``H`` hidden size, ``D`` inner channels (``intermediate_size``), ``N`` state size, ``R``
time step rank, ``K`` convolution width, ``n`` tensor-parallel ranks. ``D`` in a shape is the logical size; a rank
holds ``D/n`` of it, rounded up.

What is cut where, and what is communicated::

    parameter              held by a rank     forward              backward
    in_proj   [2D, H]      x and z rows       -                    all-reduce of dh
    conv1d    [D, 1, K]    rows               -                    -
    x_proj    [R+2N, D]    columns            all-reduce, float32  all-reduce of d(dt), dB and dC, one message
    dt_proj   [D, R]       rows               -                    -
    A, D      [D, N], [D]  rows               -                    -
    out_proj  [H, D]       columns            all-reduce           -

Mamba-1 allows this because after x_proj every channel is independent (arXiv:2312.00752, algorithm 2); the split
is that of vLLM's mixer of the same name. The gradient all-reduce of dt, B and C stands after their norms, on what
dt_proj and the scan consume, so the norm weights get whole gradients on every rank. What is held whole by every rank
(norms, out_proj's bias) gets the same gradient on all of them to the bit: all that reaches it was computed alike
everywhere, or came out of a collective, which gives every rank the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_mamba.batch import MambaMetadata, MambaMetadataBuilder, check_rows, whole_sequences
from tp_mamba.kernels.common.checks import check_shape
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.layers.checks import check_grad_batch, check_hidden_states, check_options, check_sizes
from tp_mamba.layers.conv import ColumnParallelConv1d
from tp_mamba.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from tp_mamba.layers.mamba_state import MambaState, state_for
from tp_mamba.layers.norm import RMSNorm, split_and_norm
from tp_mamba.layers.recompute import Recompute
from tp_mamba.layers.state_spec import StateSpec
from tp_mamba.layers.time_steps import TimeSteps
from tp_mamba.layers.weights import DENSE
from tp_mamba.options import resolve_compute_dtype, resolve_dtype
from tp_mamba.parallel.collectives import copy_all_to_tp
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial, Scattered

__all__ = ["MambaMixer", "MambaState"]


class MambaMixer(TimeSteps):
    """``[.., H] -> [.., H]``: in_proj, causal convolution, selective scan, gate, out_proj.

    Argument names and attributes are those of vLLM's ``MambaMixer``. Built with ``trainable`` its parameters take
    gradients, and ``A_log`` is one of them in the place of ``A``.

    Attributes:
        dtype: dtype of the activations.
        recomputes: whether the backward pass computes the convolution and the time steps again, instead of keeping them
            (:mod:`tp_mamba.layers.recompute`).
    """

    recomputes = False

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
        trainable: bool = False,
        compute_dtype: torch.dtype | None = None,
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
            trainable: hold ``A_log`` instead of ``A``, and let parameters take gradients.
            compute_dtype: dtype of the activations, by default that of the parameters; bfloat16 or float16 with
                float32 parameters, of which each product then rounds a copy.

        Raises:
            ValueError: a size out of range, more ranks than channels, an unknown activation or dtype, or an
                option whose feature is not available.
        """
        super().__init__(tp, prefix)
        name = prefix or "MambaMixer"
        check_sizes(name, H=hidden_size, D=intermediate_size, R=time_step_rank)
        check_options(name, ssm_state_size, activation, is_lora_enabled, cache_config)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.ssm_state_size, self.conv_kernel_size = ssm_state_size, conv_kernel_size
        self.time_step_rank, self.activation, self.use_rms_norm = time_step_rank, activation, use_rms_norm
        asked = dtype or getattr(model_config, "dtype", None) or torch.get_default_dtype()
        dtype = resolve_dtype(asked, None, f"{name}: dtype")
        self.dtype = resolve_compute_dtype(compute_dtype, dtype, f"{name}: compute_dtype")
        self.cache_config = cache_config
        self.get_state_dtype()  # refuses what it names

        D, N, R = intermediate_size, ssm_state_size, time_step_rank
        held = {"tp": self.tp, "dtype": dtype, "device": device}
        kind: str = getattr(model_config, "weight_kind", DENSE)

        def named(child: str) -> dict[str, Any]:
            return {"prefix": f"{prefix}.{child}".lstrip("."), **held}

        self.in_proj = MergedColumnParallelLinear(
            hidden_size, [D, D], bias=use_bias, weight_kind=kind, **named("in_proj")
        )
        self.conv1d = ColumnParallelConv1d(D, conv_kernel_size, use_conv_bias, activation, **named("conv1d"))
        self.x_proj = RowParallelLinear(
            D, R + 2 * N, bias=False, reduce_in_float32=True, weight_kind=kind, **named("x_proj")
        )
        self.add_dt_proj(D, R, weight_kind=kind, **named("dt_proj"))
        self.out_proj = RowParallelLinear(
            D, hidden_size, bias=use_bias, weight_kind=kind, **named("out_proj")
        )
        self.add_recurrence(D, N, dtype=dtype, device=device, trainable=trainable)
        self.intermediate_size_local = self.D.shape[0]
        self._state_shape = (
            (self.intermediate_size_local, conv_kernel_size - 1),
            (self.intermediate_size_local, N),
        )
        self.dt_layernorm = self.b_layernorm = self.c_layernorm = None
        if use_rms_norm:
            eps, weighted = rms_norm_eps, rms_norm_has_weight
            self.dt_layernorm = RMSNorm(R, eps, weighted, **named("dt_layernorm"))
            self.b_layernorm = RMSNorm(N, eps, weighted, **named("b_layernorm"))
            self.c_layernorm = RMSNorm(N, eps, weighted, **named("c_layernorm"))
        if not trainable:
            self.requires_grad_(False)
        self.reset_time_steps()

    def forward(
        self,
        hidden_states: torch.Tensor,
        metadata: MambaMetadata | None = None,
        state: MambaState | None = None,
    ) -> torch.Tensor:
        """Mix the tokens of each sequence; two all-reduces, whatever the batch is made of.

        With gradients there are two more in backward, and what is updated in place has none: pass no state, or go from
        segment to segment with :meth:`segment`.

        Args:
            hidden_states: packed ``[T, H]``, decode tokens first, or dense ``[B, L, H]``, replicated.
            metadata: what the ``T`` (or ``B * L``) tokens are. None: each row of a dense batch, or all of a
                packed one, is one sequence from its beginning, and no state is kept.
            state: this layer's slots, read and updated in place where ``metadata`` names one.

        Returns:
            The same shape and dtype, replicated.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit one another, or slots named that ``state`` does not
                have; before anything is computed, communicated or written.
            RuntimeError: gradients are tracked, and the batch has decode rows or names slots.
        """
        return self.partial(hidden_states, metadata, state).sum().view(hidden_states.shape)

    def partial(
        self,
        hidden_states: torch.Tensor | Scattered,
        metadata: MambaMetadata | None = None,
        state: MambaState | None = None,
    ) -> Partial:
        """As :meth:`forward`, with out_proj's sum ``[T, H]`` left to its consumer to finish: the next norm."""
        batch, (conv_state, ssm_state) = self._check_inputs(hidden_states, metadata, state)
        if self._tracks_grad(hidden_states):
            check_grad_batch(self.prefix or "MambaMixer", batch, stateful=conv_state is not None)
            return self._with_gradients(hidden_states, batch, None)[0]
        x_TD, z_TD = self.in_proj(_packed(hidden_states)).chunk(2, dim=-1)
        u_TD = self.conv1d(x_TD, batch, conv_state)
        dt_TR, B_TN, C_TN = self._split(self.x_proj.partial(u_TD, slices=True))
        y_TD = self.advance(u_TD, z_TD, dt_TR, B_TN, C_TN, batch, ssm_state)
        return self.out_proj.partial(y_TD)

    def segment(
        self,
        hidden_states: torch.Tensor,
        state: MambaState | None = None,
        metadata: MambaMetadata | None = None,
    ) -> tuple[torch.Tensor, MambaState]:
        """As :meth:`forward` for a piece of each sequence, from a state to a state, with gradients through both.

        Args:
            hidden_states: packed ``[T, H]`` or dense ``[B, L, H]``, replicated.
            state: before each sequence of the batch, ``conv_state [S, D/n, K-1]`` and ``ssm_state [S, D/n, N]``; by
                default zeros, the beginning. Not written.
            metadata: the sequences; its slots are not read.

        Returns:
            what :meth:`forward` returns, and the state after each sequence.

        Raises:
            ValueError: as :meth:`forward`, or a state of another number of sequences.
            RuntimeError: the batch has decode rows.
        """
        batch, _ = self._check_inputs(hidden_states, metadata, None)
        name, S = self.prefix or "MambaMixer", batch.num_prefills
        check_grad_batch(name, batch, stateful=False)
        dtypes = (self.dtype, wide_dtype(self.dtype))
        if state is None:
            zeros = (
                torch.zeros(S, *shape, dtype=dtype, device=hidden_states.device)
                for shape, dtype in zip(self._state_shape, dtypes, strict=True)
            )
            state = MambaState(*zeros)
        for part, tensor, shape in zip(MambaState._fields, state, self._state_shape, strict=True):
            check_shape(name, part, tensor, "one state per sequence", (S, *shape))
        partial, state = self._with_gradients(hidden_states, batch, state)
        assert state is not None
        return partial.sum().view(hidden_states.shape), state

    def _with_gradients(
        self, hidden_states: torch.Tensor | Scattered, batch: MambaMetadata, initial: MambaState | None
    ) -> tuple[Partial, MambaState | None]:
        """The same five steps for a batch of prefills; states come and go as values, where there are initial ones."""
        conv_state, ssm_state = (None, None) if initial is None else initial
        with Recompute(active=self.recomputes and torch.is_grad_enabled()) as recompute:
            x_TD, z_TD = self.in_proj(_packed(hidden_states)).chunk(2, dim=-1)
            u_TD, conv_state = self.conv1d.sequences(x_TD, batch, conv_state)
            dt_TR, B_TN, C_TN = copy_all_to_tp(self._split(self.x_proj.partial(u_TD, slices=True)), self.tp)
            delta_TD = self.time_steps(dt_TR)
            y_TD, ssm_state = self.scan_sequences(u_TD, z_TD, delta_TD, B_TN, C_TN, batch, ssm_state)
            partial = self.out_proj.partial(y_TD)

            x, dt, before = x_TD.detach(), dt_TR.detach(), None if initial is None else initial.conv_state
            recompute.offer(u_TD, lambda: self.conv1d.sequences(x, batch, before)[0])
            recompute.offer(delta_TD, lambda: self.time_steps(dt))
        if conv_state is None or ssm_state is None:
            return partial, None
        return partial, MambaState(conv_state, ssm_state)

    def _split(self, partial: Partial) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Finish x_proj's sum as ``dt [T, R]``, ``B [T, N]`` and ``C [T, N]``."""
        return split_and_norm(
            partial,
            *(self.dt_layernorm, self.b_layernorm, self.c_layernorm),
            time_step_rank=self.time_step_rank,
            state_size=self.ssm_state_size,
            dt_dtype=self.dtype,
        )

    def _tracks_grad(self, h: torch.Tensor | Scattered) -> bool:
        """Whether autograd is to record a call; what takes no gradient takes the same kernels as without autograd."""
        return torch.is_grad_enabled() and (
            h.requires_grad or any(p.requires_grad for p in self.parameters())
        )

    def _check_inputs(
        self, h: torch.Tensor | Scattered, metadata: MambaMetadata | None, state: MambaState | None
    ) -> tuple[MambaMetadata, MambaState | tuple[None, None]]:
        """Refuse what cannot be mixed, and describe a batch that came without metadata."""
        name, A = self.prefix or "MambaMixer", "A_log" if self.trainable else "A"
        check_hidden_states(name, h, self.hidden_size, self.dtype)
        if (held := getattr(self, A).dtype).itemsize < 4:
            raise ValueError(
                f"{name}: {A} is in {held} but exp needs at least float32: assign a parameter in float32"
            )
        if metadata is None:
            B, L = (1, len(h)) if h.dim() == 2 else h.shape[:2]
            metadata, state = whole_sequences(B, L, h.device), None
        else:
            rows = h.shape[0] if h.dim() == 2 else h.shape[0] * h.shape[1]
            check_rows(f"{name}: the batch", rows, metadata)
        return metadata, state_for(name, state, metadata, *self._state_shape, h.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MambaMixer:
        """As ``nn.Module``; the mixer's dtype, and by default the states', is that of its parameters."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def get_state_shape(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """One slot's ``(conv_state [D/n, K-1], ssm_state [D/n, N])`` on this rank, D rounded up to ranks."""
        return self._state_shape

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of ``(conv_state, ssm_state)``: by default the model's, and float32."""
        asked = [
            getattr(self.cache_config, f"mamba_{part}", "auto") for part in ("cache_dtype", "ssm_cache_dtype")
        ]
        return (
            resolve_dtype(asked[0], self.dtype, "mamba_cache_dtype"),
            resolve_dtype(asked[1], wide_dtype(self.dtype), "mamba_ssm_cache_dtype"),
        )

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


def _packed(h: torch.Tensor | Scattered) -> torch.Tensor | Scattered:
    return h.flatten(0, 1) if isinstance(h, torch.Tensor) and h.dim() == 3 else h
