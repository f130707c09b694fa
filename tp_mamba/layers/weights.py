"""What the weight of a linear layer is: the tensors it consists of, how each is cut, and its product.

:mod:`tp_mamba.layers.linear` knows which dimension of ``W [out, in]`` is cut and which collective follows; a
:class:`LinearWeight` knows how ``W`` is held. Dense is the kind that is shipped. Others, quantised ones for example,
are one class each, registered under the name that a config.json gives as ``quantization_config.quant_method``::

    class Factors(LinearWeight): ...
    register_weight_kind("factors", Factors())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, cast

import torch

from tp_mamba.kernels.common.dtypes import HALVES, wide_dtype
from tp_mamba.kernels.linear import linear, linear_partial
from tp_mamba.kernels.linear.launch import MAX_ROWS
from tp_mamba.layers.init import initialize
from tp_mamba.parallel.module import ShardedModule
from tp_mamba.parallel.sharding import Shard


def for_activations(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``weight`` as activations ``x`` are multiplied by it: float32 of a model in training, rounded to 16-bit ``x``.

    The gradient comes back in float32. Any other mixture of dtypes is left for the product to refuse.
    """
    return weight.to(x.dtype) if weight.dtype is torch.float32 and x.dtype in HALVES else weight


class LinearWeight(ABC):
    """One kind of weight. It holds nothing itself: its tensors are parameters of the layer that it is passed."""

    @abstractmethod
    def declare(
        self,
        layer: ShardedModule,
        whole: Shard,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Give ``layer`` its tensors with :meth:`ShardedModule.add_parameter`, uninitialised.

        Args:
            whole: how ``W [out, in]`` would be cut if it were one tensor; every tensor is to be cut so that a rank can
                multiply by its rows (or columns) of ``W`` alone.
            dtype: of the layer's activations.
        """

    @abstractmethod
    def initialize(self, layer: ShardedModule, draw: Callable[[torch.Tensor], object]) -> None:
        """Set initial values, where ``draw`` fills ``W [out, in]`` in place."""

    @abstractmethod
    def divide_(self, layer: ShardedModule, divisor: float) -> None:
        """Divide ``W`` by ``divisor``, as initial values of deep models are."""

    @abstractmethod
    def product(
        self, layer: ShardedModule, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x [..., in] @ W.T + bias`` of this rank's part of ``W``, in the dtype of ``x``."""

    def product_into(
        self, out: torch.Tensor, layer: ShardedModule, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """:meth:`product` of ``x [M, in]``, written to ``out [M, out]``; without a gradient."""
        out.copy_(self.product(layer, x, bias))

    def wide_product(self, layer: ShardedModule, x: torch.Tensor, *, slices: bool) -> torch.Tensor:
        """As :meth:`product`, but in at least float32, for a sum that is to be rounded once, when it is complete.

        Args:
            slices: the consumer adds up slices: ``x [T, in]`` may give ``[slices, T, out]``, whose sum is the result.
        """
        return self.product(layer, x).to(wide_dtype(x.dtype))

    def dense(self, layer: ShardedModule) -> torch.Tensor | None:
        """This rank's part of ``W`` as one tensor, for a kernel that fuses its product; None where it is not one."""
        return None


class Dense(LinearWeight):
    """``W [out, in]`` as one tensor, ``weight``."""

    def declare(
        self,
        layer: ShardedModule,
        whole: Shard,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        layer.add_parameter("weight", whole, dtype=dtype, device=device)

    def initialize(self, layer: ShardedModule, draw: Callable[[torch.Tensor], object]) -> None:
        initialize(layer, "weight", draw)

    @torch.no_grad()
    def divide_(self, layer: ShardedModule, divisor: float) -> None:
        _weight(layer).div_(divisor)

    def product(
        self, layer: ShardedModule, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear(
            x, for_activations(_weight(layer), x), None if bias is None else for_activations(bias, x)
        )

    def product_into(
        self, out: torch.Tensor, layer: ShardedModule, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        if bias is None and len(x) > MAX_ROWS:
            torch.mm(x, for_activations(_weight(layer), x).t(), out=out)
        else:
            super().product_into(out, layer, x, bias)

    def wide_product(self, layer: ShardedModule, x: torch.Tensor, *, slices: bool) -> torch.Tensor:
        return linear_partial(x, for_activations(_weight(layer), x), in_float32=True, in_slices=slices)

    def dense(self, layer: ShardedModule) -> torch.Tensor | None:
        return _weight(layer)


def _weight(layer: ShardedModule) -> torch.Tensor:
    return cast(torch.Tensor, layer.weight)


DENSE: Final = "dense"
_KINDS: dict[str, LinearWeight] = {DENSE: Dense()}


def register_weight_kind(name: str, kind: LinearWeight) -> None:
    """Make ``kind`` the weight of layers built with ``weight_kind=name``.

    Raises:
        ValueError: ``kind`` is no LinearWeight, or ``name`` stands for another kind already.
    """
    if not isinstance(kind, LinearWeight):
        raise ValueError(f"got {kind!r} for the weight kind {name!r}: pass an instance of a LinearWeight")
    if type(_KINDS.get(name, kind)) is not type(kind):
        raise ValueError(
            f"the weight kind {name!r} is {type(_KINDS[name]).__name__} already: register {type(kind).__name__} under "
            "another name"
        )
    _KINDS[name] = kind


def unregister_weight_kind(name: str) -> None:
    """Forget a kind of weight; layers that were built with it keep it.

    Raises:
        ValueError: there is none of that name, or it is ``"dense"``, the kind of every layer that names no other.
    """
    if name == DENSE:
        raise ValueError(
            f"the weight kind {DENSE!r} cannot be removed: layers that name no kind are built with it"
        )
    get_weight_kind(name)
    del _KINDS[name]


def weight_kinds() -> tuple[str, ...]:
    """The names that layers can be built with."""
    return tuple(_KINDS)


def get_weight_kind(name: str) -> LinearWeight:
    """The kind registered as ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in _KINDS:
        raise ValueError(
            f"unknown weight kind {name!r}: there are {', '.join(_KINDS)}; register others with register_weight_kind"
        )
    return _KINDS[name]
