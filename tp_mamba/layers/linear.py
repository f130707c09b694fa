"""Column- and row-parallel linear layers, ``y = x W^T + b`` with ``W [out, in]``.

A column-parallel layer cuts ``out``: every rank sees the whole input and computes a slice of the output.
A row-parallel layer cuts ``in``: every rank sees a slice of the input and computes a partial sum of the
whole output. One after the other they need a single all-reduce (Megatron-LM, arXiv:1909.08053).

This file knows which dimension is cut and what is communicated; what ``W`` is, a
:class:`~tp_mamba.layers.weights.LinearWeight` knows. Arguments, and the tuple returned with ``skip_bias_add``, are
those of vLLM's layers of the same names. A dimension that the ranks do not divide is padded with zero channels, which
changes no result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tp_mamba.layers.init import initialize, uniform
from tp_mamba.layers.weights import DENSE, get_weight_kind
from tp_mamba.parallel.collectives import gather_from_tp, scatter_to_tp
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.partial import Lent, Partial, Scattered, whole
from tp_mamba.parallel.sharding import Shard, padded_size

Output = torch.Tensor | tuple[torch.Tensor, nn.Parameter | None]


def check_rank_count(size: int, tp: TensorParallel, what: str) -> None:
    """Refuse more ranks than channels, where ranks would work for nothing but padding.

    Raises:
        ValueError: ``tp.size > size``.
    """
    if tp.size > size:
        raise ValueError(
            f"{what} has {size} channels, too few for {tp.size} tensor-parallel ranks: use at most {size} ranks"
        )


class ParallelLinear(ShardedModule):
    """What column- and row-parallel layers share: a weight of some kind, a bias, and their initial values."""

    weight: nn.Parameter
    """Where the weight is dense; other kinds hold what they declare."""
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        weight: Shard,
        bias: Shard | None,
        *,
        weight_kind: str,
        tp: TensorParallel | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        prefix: str,
    ) -> None:
        super().__init__(tp, prefix)
        if input_size < 1 or output_size < 1:
            raise ValueError(
                f"{prefix or type(self).__name__}: input_size {input_size} and output_size {output_size} "
                "must both be positive"
            )
        self.input_size, self.output_size = input_size, output_size
        self.kind = get_weight_kind(weight_kind)
        self.kind.declare(self, weight, dtype=dtype, device=device)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.add_parameter("bias", bias, dtype=dtype, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of ``torch.nn.Linear``: uniform over ``+-in^-0.5``, weight and bias."""
        self.reset_weight()
        if self.bias is not None:
            initialize(self, "bias", uniform(self.input_size**-0.5))

    def reset_weight(self) -> None:
        """Draw the weight anew, and leave the bias."""
        self.kind.initialize(self, uniform(self.input_size**-0.5))

    def divide_weight_(self, divisor: float) -> None:
        """Divide the weight, whatever kind it is, in place."""
        self.kind.divide_(self, divisor)

    def dense_weight(self) -> torch.Tensor | None:
        """This rank's part of the weight, for a kernel that fuses the product; None where it is not one tensor."""
        return self.kind.dense(self)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.output_size}, bias={self.bias is not None}, tp={self.tp.rank}/{self.tp.size}"


class ColumnParallelLinear(ParallelLinear):
    """Linear layer cut along its output; forward no collective, backward all-reduce of the input gradient.

    ``x [..., in]`` replicated -> ``y_r [..., out/n]`` (rounded up), or ``[..., out]`` with ``gather_output``.
    Gradients: ``dx = sum_r dy_r W_r`` (all-reduce), ``dW_r = dy_r^T x`` and ``db_r = sum dy_r`` local.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        *,
        parts: int = 1,
        bias_in_float32: bool = False,
        weight_kind: str = DENSE,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "",
    ) -> None:
        """Build rank ``tp.rank``'s shard.

        Args:
            input_size: ``in``.
            output_size: ``out`` of the full layer.
            bias: whether there is a bias ``[out]``, cut like the output.
            gather_output: all-gather the output along its last dimension, padding removed.
            skip_bias_add: return ``(y, bias)`` with the bias not added, for a kernel that fuses it.
            parts: equal pieces of ``out`` that are cut separately (see MergedColumnParallelLinear).
            bias_in_float32: hold the bias in at least float32.
            weight_kind: the registered name of what the weight is.
            tp, dtype, device: the ranks (default one), and where and how the shard is held.
            prefix: the layer's name in checkpoints and messages.

        Raises:
            ValueError: a size below 1, more ranks than channels, an unknown weight kind, or gather_output with
                skip_bias_add.
        """
        tp = checked(tp)
        if gather_output and skip_bias_add and bias:
            raise ValueError(
                f"{prefix or 'ColumnParallelLinear'}: gather_output and skip_bias_add do not go together, the output "
                "would be whole and the bias a slice; set one of them"
            )
        if bias and bias_in_float32 and not skip_bias_add:
            raise ValueError(
                f"{prefix or 'ColumnParallelLinear'}: a float32 bias is for a kernel that adds it, the GEMM adds "
                "one of its own dtype; set skip_bias_add=True"
            )
        check_rank_count(output_size // parts, tp, prefix or "the output")
        pieces = (output_size // parts,) * parts
        super().__init__(
            input_size,
            output_size,
            Shard(shape=(output_size, input_size), dim=0, pieces=pieces),
            Shard(shape=(output_size,), dim=0, pieces=pieces, wide=bias_in_float32) if bias else None,
            weight_kind=weight_kind,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix=prefix,
        )
        self.parts, self.gather_output, self.skip_bias_add = parts, gather_output, skip_bias_add
        self.output_size_local = parts * (padded_size(output_size // parts, tp.size) // tp.size)

    def forward(self, x: torch.Tensor | Scattered) -> Output:
        """``x [..., in]`` -> ``y``, or ``(y, bias)`` with ``skip_bias_add``."""
        y = self._product_of_lent(x) if isinstance(x, Lent) else self.local_product(whole(x, self.tp))
        if self.gather_output:
            y = self._gather(y)
        return (y, self.bias) if self.skip_bias_add else y

    def local_product(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` -> this rank's ``y_r``; the gradient of ``x`` is this rank's term, for the caller to sum."""
        return self.kind.product(self, x, None if self.skip_bias_add else self.bias)

    def _product_of_lent(self, x: Lent) -> torch.Tensor:
        """:meth:`local_product` of rows that arrive while others are multiplied."""
        y = x.value.new_empty(x.rows, self.output_size_local)
        for rows in x.pieces():
            self.kind.product_into(y[rows], self, x.value[rows], None if self.skip_bias_add else self.bias)
        return y

    def _gather(self, y: torch.Tensor) -> torch.Tensor:
        """Join the slices part by part, so that ``[x_r | z_r]`` of every rank becomes ``[x | z]``."""
        local, part = self.output_size_local // self.parts, self.output_size // self.parts
        gathered = gather_from_tp(y, self.tp).unflatten(-1, (self.tp.size, self.parts, local))
        joined = gathered.transpose(-3, -2).flatten(-2)
        return joined[..., :part].flatten(-2)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of equal width in one GEMM, each cut separately (``in_proj``: x and z).

    ``x [..., in]`` -> ``[..., sum(output_sizes)/n]``, rank r's slice of each piece one after the other.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        *,
        weight_kind: str = DENSE,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "",
    ) -> None:
        """As ColumnParallelLinear, with ``output_sizes`` the widths of the pieces.

        Raises:
            ValueError: no pieces, or pieces of different widths.
        """
        if len(set(output_sizes)) != 1:
            raise ValueError(
                f"{prefix or 'MergedColumnParallelLinear'}: output_sizes {list(output_sizes)} must be one or more "
                "equal widths; use a ColumnParallelLinear for each width"
            )
        super().__init__(
            input_size,
            sum(output_sizes),
            bias,
            gather_output,
            skip_bias_add,
            parts=len(output_sizes),
            weight_kind=weight_kind,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix=prefix,
        )
        self.output_sizes = tuple(output_sizes)


class RowParallelLinear(ParallelLinear):
    """Linear layer cut along its input; forward all-reduce of the partial sums, backward no collective.

    ``x_r [..., in/n]`` -> ``y = sum_r x_r W_r^T + b`` on every rank, the bias added once, after the sum.
    Gradients: ``dx_r = dy W_r``, ``dW_r = dy^T x_r`` and ``db = sum dy``, all local.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        reduce_results: bool = True,
        *,
        reduce_in_float32: bool = False,
        weight_kind: str = DENSE,
        tp: TensorParallel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix: str = "",
    ) -> None:
        """Build rank ``tp.rank``'s shard.

        Args:
            input_size: ``in`` of the full layer.
            output_size: ``out``.
            bias: whether there is a bias ``[out]``, held whole by every rank.
            input_is_parallel: ``x`` is this rank's slice already (padding included); else it is whole and
                this rank's slice is taken.
            skip_bias_add: return ``(y, bias)`` with the bias not added.
            reduce_results: sum over the ranks; else return this rank's partial sum.
            reduce_in_float32: compute and sum the partial results in float32, and return float32: nothing
                is rounded to the model's dtype before the sum is complete.
            weight_kind: the registered name of what the weight is.
            tp, dtype, device: the ranks (default one), and where and how the shard is held.
            prefix: the layer's name in checkpoints and messages.

        Raises:
            ValueError: a size below 1, more ranks than channels, an unknown weight kind, or a bias that would be
                added to partial sums.
        """
        tp = checked(tp)
        if bias and not reduce_results and not skip_bias_add:
            raise ValueError(
                f"{prefix or 'RowParallelLinear'}: with reduce_results=False the bias would be added once on every "
                "rank; set skip_bias_add=True and add it after the sum"
            )
        check_rank_count(input_size, tp, prefix or "the input")
        super().__init__(
            input_size,
            output_size,
            Shard(shape=(output_size, input_size), dim=1),
            Shard(shape=(output_size,)) if bias else None,
            weight_kind=weight_kind,
            tp=tp,
            dtype=dtype,
            device=device,
            prefix=prefix,
        )
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        self.reduce_results, self.reduce_in_float32 = reduce_results, reduce_in_float32
        self.input_size_local = padded_size(input_size, tp.size) // tp.size

    def partial(self, x: torch.Tensor, *, slices: bool = False) -> Partial:
        """``x [..., in/n]`` (or ``[..., in]``) -> this rank's term of ``y [..., out]``, for its consumer to finish.

        Args:
            slices: the consumer is :meth:`Partial.split`, which may add up slices of the inner dimension as well.
        """
        if not self.input_is_parallel:
            x = scatter_to_tp(F.pad(x, (0, self.input_size_local * self.tp.size - self.input_size)), self.tp)
        bias = None if self.skip_bias_add else self.bias
        if not self.reduce_in_float32:
            if not self.reduce_results:  # nobody is to sum it
                return Partial(self.kind.product(self, x), self.tp, bias)
            product = functools.partial(self.kind.product, self)
            return self.tp.communicator.begin(product, x, self.output_size, self.tp, bias)
        # A bias is added to a finished sum, which slices that a kernel adds up never are.
        slices = slices and bias is None and self.tp.communicator.takes_slices(self.tp)
        value = self.kind.wide_product(self, x, slices=slices)
        return Partial(value, self.tp, bias, sliced=value.dim() > x.dim())

    def forward(self, x: torch.Tensor) -> Output:
        """``x [..., in/n]`` (or ``[..., in]``) -> ``y [..., out]``, or ``(y, bias)`` with ``skip_bias_add``."""
        partial = self.partial(x)
        y = partial.sum() if self.reduce_results else partial.value
        return (y, self.bias) if self.skip_bias_add else y
