"""Sums over the GPUs of one host, each rank's term stored straight into the others' memory, and what comes next.

    all_reduce(x)              = sum over r of x_r
    all_reduce_add_rms_norm(x) = add_rms_norm(all_reduce(x), residual)
    all_reduce_split_dt_bc(x)  = split_dt_bc(all_reduce(x))

Every rank of a group calls the same functions with the same shapes in the same order, on one stream. What a sum passes
through is an :class:`Exchange`: memory that all of them map, made once (``layout.py``); how it does, without a barrier
and without a flag, says ``mail.py``.

Bits: terms travel as they come (a NaN may become another NaN), are added in rank order, from rank 0's on, in float32,
and the sum is rounded once, to the dtype of the terms: whatever the size of the message, on every rank, in every run.
Norms and splits have the bits of the functions they are named for. Where a product has rounded its term to 16 bits, it
is those 16 bits that travel and are added, in every kernel here; a term in float32 travels in float32.

For 2 to 8 ranks; no gradient, since every function has a plain counterpart. A kernel waits for the other ranks and
never gives up: a rank that is lost leaves the others waiting, until their processes are ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tp_mamba.kernels.all_reduce.launch import norm_goes_one_way, split_plan
from tp_mamba.kernels.all_reduce.layout import MAX_RANKS, PROGRAMS
from tp_mamba.kernels.common.checks import check_device, check_shape, refuse_grad, without_gaps
from tp_mamba.kernels.common.dispatch import calls_directly
from tp_mamba.kernels.common.dtypes import HALVES
from tp_mamba.kernels.common.remember import Form, Key, forms, key_of, remembered
from tp_mamba.kernels.common.static_operands import declare_static_operands
from tp_mamba.kernels.linear.cpu import add_slices_cpu as add_slices
from tp_mamba.kernels.rms_norm import _check_call as _check_norm_call
from tp_mamba.kernels.rms_norm import add_rms_norm
from tp_mamba.kernels.split_dt_bc import _check as _check_split_call
from tp_mamba.kernels.split_dt_bc import split_dt_bc

SUMMED = HALVES | {torch.float32}
"""The dtypes of terms that are summed here."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """What one rank of a group holds of the memory that its sums pass through.

    It is used by one kernel at a time: by those of one stream.
    """

    rank: int
    peers: torch.Tensor
    """``[n]`` int64: where this rank reaches every rank's inbox, its own among them, full of marks (bytes of 255)."""
    rounds: torch.Tensor
    """``[programs]`` int32, zeros at first: how many rounds each program has gone, modulo the window.

    In memory, and counted by the kernels themselves: the host's count would be of the capture, in every replay.
    """

    def __post_init__(self) -> None:
        size, programs = len(self.peers), len(self.rounds)
        if not 2 <= size <= MAX_RANKS or not 0 <= self.rank < size:
            raise ValueError(
                f"got rank {self.rank} of {size} for sums between GPUs of one host: give 2 to {MAX_RANKS} ranks"
            )
        if not 1 <= programs <= PROGRAMS:
            raise ValueError(f"got {programs} counters of rounds: give one a program, 1 to {PROGRAMS}")

    @property
    def size(self) -> int:
        return len(self.peers)

    @property
    def programs(self) -> int:
        return len(self.rounds)


def _all_reduce_into(
    x: torch.Tensor, out: torch.Tensor, rounds: torch.Tensor, peers: torch.Tensor, rank: int
) -> None:
    from tp_mamba.kernels.all_reduce.any import launch

    launch(out, x, rounds, peers, rank)


def _all_reduce_(x: torch.Tensor, rounds: torch.Tensor, peers: torch.Tensor, rank: int) -> None:
    _all_reduce_into(x, x, rounds, peers, rank)


def _all_reduce(
    x: torch.Tensor, rounds: torch.Tensor, peers: torch.Tensor, rank: int, out_dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    _all_reduce_into(x.contiguous(), out, rounds, peers, rank)
    return out


def _all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    rounds: torch.Tensor,
    peers: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tp_mamba.kernels.all_reduce.norm import launch

    H = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_residual = torch.empty_like(x, dtype=residual_dtype, memory_format=torch.contiguous_format)
    rows = None if residual is None else residual.reshape(-1, H)
    launch(
        out.view(-1, H), new_residual.view(-1, H), x.reshape(-1, H).contiguous(), rows, weight, bias, eps,
        rounds, peers, rank,
    )  # fmt: skip
    return out, new_residual


def _all_reduce_split_dt_bc(
    x: torch.Tensor,
    time_step_rank: int,
    state_size: int,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
    dt_dtype: torch.dtype,
    rounds: torch.Tensor,
    peers: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tp_mamba.kernels.all_reduce.split import launch

    T, device = x.shape[-2], x.device
    plan = split_plan(T, time_step_rank, state_size, dt_dtype, len(peers), len(rounds))
    assert plan is not None
    dt = torch.empty(T, time_step_rank, dtype=dt_dtype, device=device)
    bc = torch.empty(T, 2 * state_size, dtype=torch.float32, device=device)
    weights = without_gaps(dt_weight), without_gaps(b_weight), without_gaps(c_weight)
    launch(dt, bc, x.contiguous(), *weights, eps, rounds, peers, rank, plan)
    return dt, bc


torch.library.define(
    "tp_mamba::all_reduce",
    "(Tensor x, Tensor(a!) rounds, Tensor peers, int rank, ScalarType out_dtype) -> Tensor",
)
torch.library.define(
    "tp_mamba::all_reduce_", "(Tensor(a!) x, Tensor(b!) rounds, Tensor peers, int rank) -> ()"
)
torch.library.define(
    "tp_mamba::all_reduce_add_rms_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, ScalarType residual_dtype, "
    "Tensor(a!) rounds, Tensor peers, int rank) -> (Tensor, Tensor)",
)
torch.library.define(
    "tp_mamba::all_reduce_split_dt_bc",
    "(Tensor x, int time_step_rank, int state_size, Tensor? dt_weight, Tensor? b_weight, Tensor? c_weight, "
    "float? eps, ScalarType dt_dtype, Tensor(a!) rounds, Tensor peers, int rank) -> (Tensor, Tensor)",
)
_ON = ("cpu", "cuda")  # on a CPU where Triton interprets
torch.library.impl("tp_mamba::all_reduce", _ON, _all_reduce)
torch.library.impl("tp_mamba::all_reduce_", _ON, _all_reduce_)
torch.library.impl("tp_mamba::all_reduce_add_rms_norm", _ON, _all_reduce_add_rms_norm)
torch.library.impl("tp_mamba::all_reduce_split_dt_bc", _ON, _all_reduce_split_dt_bc)
declare_static_operands("tp_mamba::all_reduce", "peers")
declare_static_operands("tp_mamba::all_reduce_", "peers")
declare_static_operands("tp_mamba::all_reduce_add_rms_norm", "weight", "bias", "peers")
declare_static_operands("tp_mamba::all_reduce_split_dt_bc", "dt_weight", "b_weight", "c_weight", "peers")


@torch.library.register_fake("tp_mamba::all_reduce")
def _all_reduce_fake(
    x: torch.Tensor, rounds: torch.Tensor, peers: torch.Tensor, rank: int, out_dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.register_fake("tp_mamba::all_reduce_")
def _all_reduce_in_place_fake(x: torch.Tensor, rounds: torch.Tensor, peers: torch.Tensor, rank: int) -> None:
    return None


@torch.library.register_fake("tp_mamba::all_reduce_add_rms_norm")
def _all_reduce_add_rms_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    rounds: torch.Tensor,
    peers: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype)


@torch.library.register_fake("tp_mamba::all_reduce_split_dt_bc")
def _all_reduce_split_dt_bc_fake(
    x: torch.Tensor,
    time_step_rank: int,
    state_size: int,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
    dt_dtype: torch.dtype,
    rounds: torch.Tensor,
    peers: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, R, N = x.shape[-2], time_step_rank, state_size
    return x.new_empty(T, R, dtype=dt_dtype), x.new_empty(T, 2 * N, dtype=torch.float32)


def all_reduce(x: torch.Tensor, exchange: Exchange, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The ranks' sum of ``x``, each rank's of the same shape and dtype.

    Args:
        x: any shape; float32, bfloat16 or float16.
        exchange: what the group's sums pass through.
        out_dtype: dtype of the sum, by default that of ``x``.

    Returns:
        The sum, contiguous, on every rank.

    Raises:
        ValueError: a wrong dtype or device.
        RuntimeError: ``x`` requires grad while grad mode is on.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check("all_reduce", key_of(x), key_of(exchange.peers), out_dtype)
    refuse_grad("all_reduce", (("x", x),))
    op = _all_reduce if calls_directly(x) else torch.ops.tp_mamba.all_reduce
    return op(x, exchange.rounds, exchange.peers, exchange.rank, out_dtype)


def all_reduce_(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """:func:`all_reduce` in place, of a contiguous ``x``; returns it.

    Raises:
        ValueError: a wrong dtype or device, or gaps between elements.
        RuntimeError: ``x`` requires grad while grad mode is on.
    """
    _check("all_reduce_", key_of(x), key_of(exchange.peers), x.dtype)
    if not x.is_contiguous():
        raise ValueError(
            f"all_reduce_: x has strides {list(x.stride())} but must be contiguous; call contiguous() on it"
        )
    refuse_grad("all_reduce_", (("x", x),))
    op = _all_reduce_ if calls_directly(x) else torch.ops.tp_mamba.all_reduce_
    op(x, exchange.rounds, exchange.peers, exchange.rank)
    return x


def all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    exchange: Exchange,
    *,
    bias: torch.Tensor | None = None,
    residual_in_fp32: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add_rms_norm(all_reduce(x) + bias, residual, weight, eps)``, to the bit; in one kernel where it can be.

    Args:
        x: ``[..., H]``; float32, bfloat16 or float16.
        residual, weight, eps, residual_in_fp32: as for :func:`tp_mamba.kernels.rms_norm.add_rms_norm`.
        exchange: what the group's sums pass through.
        bias: ``[H]`` in the dtype of ``x``, or None.

    Returns:
        ``(normed, new_residual)``, both ``[..., H]`` and contiguous.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
        RuntimeError: an input requires grad while grad mode is on.
    """
    residual_dtype = torch.float32 if residual_in_fp32 else x.dtype
    one_kernel = _check_norm(
        key_of(x), key_of(residual), key_of(weight), key_of(bias), key_of(exchange.peers)
    )
    if not one_kernel:
        total = all_reduce(x, exchange)
        total = total if bias is None else total + bias
        return add_rms_norm(total, residual, weight, eps, residual_in_fp32=residual_in_fp32)
    tensors = (("x", x), ("residual", residual), ("weight", weight), ("bias", bias))
    refuse_grad("all_reduce_add_rms_norm", tensors)
    direct = calls_directly(x, residual, weight, bias)
    op = _all_reduce_add_rms_norm if direct else torch.ops.tp_mamba.all_reduce_add_rms_norm
    return op(x, residual, weight, bias, eps, residual_dtype, exchange.rounds, exchange.peers, exchange.rank)


def all_reduce_split_dt_bc(
    x: torch.Tensor,
    time_step_rank: int,
    state_size: int,
    exchange: Exchange,
    *,
    dt_weight: torch.Tensor | None = None,
    b_weight: torch.Tensor | None = None,
    c_weight: torch.Tensor | None = None,
    eps: float | None = None,
    dt_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``split_dt_bc(all_reduce(x), ...)``, to the bit; in one kernel where it can be.

    Args:
        x: ``[T, R + 2 N]`` float32; or ``[slices, T, R + 2 N]``, slices of this rank's term, to be added up.
        exchange: what the group's sums pass through.
        time_step_rank, state_size, dt_weight, b_weight, c_weight, eps, dt_dtype: as for
            :func:`tp_mamba.kernels.split_dt_bc.split_dt_bc`.

    Returns:
        ``(dt, B, C)``, as there.

    Raises:
        ValueError: an argument has a wrong shape, size, dtype or device, or a weight comes without ``eps``.
        RuntimeError: an input requires grad while grad mode is on.
    """
    R, N = time_step_rank, state_size
    dt_dtype = x.dtype if dt_dtype is None else dt_dtype
    weights = {"dt_weight": dt_weight, "b_weight": b_weight, "c_weight": c_weight}
    keys = key_of(dt_weight), key_of(b_weight), key_of(c_weight)
    programs, peers = len(exchange.rounds), key_of(exchange.peers)
    if not _check_split(key_of(x), R, N, *keys, eps is not None, dt_dtype, peers, programs):
        total = all_reduce(add_slices(x) if x.dim() == 3 else x, exchange)
        return split_dt_bc(total, R, N, **weights, eps=eps, dt_dtype=dt_dtype)
    refuse_grad("all_reduce_split_dt_bc", (("x", x), *weights.items()))
    direct = calls_directly(x, dt_weight, b_weight, c_weight)
    op = _all_reduce_split_dt_bc if direct else torch.ops.tp_mamba.all_reduce_split_dt_bc
    memory = exchange.rounds, exchange.peers, exchange.rank
    dt, bc = op(x, R, N, dt_weight, b_weight, c_weight, eps, dt_dtype, *memory)
    B, C = torch.split_with_sizes(bc, (N, N), 1)
    return dt, B, C


@remembered
def _check(op: str, x_key: Key, peers: Key, out_dtype: torch.dtype) -> None:
    x = Form(*x_key)
    for what, dtype in (("x has dtype", x.dtype), ("out_dtype is", out_dtype)):
        if dtype not in SUMMED:
            raise ValueError(
                f"{op}: {what} {dtype} but must be float32, bfloat16 or float16; use torch.distributed.all_reduce"
            )
    check_device(op, x.device, "x", forms(exchange=peers))


@remembered
def _check_norm(x: Key, residual: Key | None, weight: Key | None, bias: Key | None, peers: Key) -> bool:
    """Refuse wrong shapes, dtypes and devices; whether one kernel does it all."""
    op = "all_reduce_add_rms_norm"
    _check_norm_call(op, x, weight, residual, x[1])
    _check(op, x, peers, x[1])
    form = Form(*x)
    check_shape(op, "bias", None if bias is None else Form(*bias), "[H]", (form.shape[-1],))
    check_device(op, form.device, "x", forms(bias=bias))
    if bias is not None and bias[1] != form.dtype:
        raise ValueError(f"{op}: bias has dtype {bias[1]} but x has {form.dtype}; convert it")
    H = form.shape[-1]
    return norm_goes_one_way(form.shape.numel() // H, H, form.dtype, peers[0][0])


@remembered
def _check_split(
    x: Key,
    R: int,
    N: int,
    dt_weight: Key | None,
    b_weight: Key | None,
    c_weight: Key | None,
    normed: bool,
    dt_dtype: torch.dtype,
    peers: Key,
    programs: int,
) -> bool:
    """Refuse wrong shapes, dtypes and devices; whether one kernel does it all."""
    _check_split_call(x, R, N, dt_weight, b_weight, c_weight, normed, dt_dtype)
    _check("all_reduce_split_dt_bc", x, peers, x[1])
    return x[1] == torch.float32 and split_plan(x[0][-2], R, N, dt_dtype, peers[0][0], programs) is not None
