"""Argument checks shared by the kernels' public functions; none of them waits for a device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, Protocol, TypeVar

import torch

from tp_mamba.kernels.common.dtypes import ANY_FLOAT, FLOATS

P = ParamSpec("P")
R = TypeVar("R")


class Operand(Protocol):
    """What a check asks of an argument: a tensor, or a remembered one's form."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


INTEGERS = frozenset((torch.int32, torch.int64))
"""Dtypes of slots and offsets."""

Named = tuple[str, torch.Tensor | None]
NamedOperands = Iterable[tuple[str, Operand | None]]

PAD_SLOT_NAME = "it is called pad_slot_id here"
PREFIX_CACHING = "for states at block boundaries, cut the sequences there and call once per piece"
VLLM_FORM = "tp_mamba.kernels.compat.vllm has a function of the same name that takes it"
"""Remedies for keywords of vLLM, as :func:`not_supported` takes them."""


def check_shape(op: str, name: str, tensor: Operand | None, letters: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` (None passes) has ``shape``, which ``letters`` spell, as in ``[B, D, L]``."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)} but {letters} is {list(shape)} here; "
            f"pass {name} in that shape"
        )


def check_floating(op: str, tensors: NamedOperands) -> None:
    """Raise ValueError for a tensor whose dtype is not one of ``DTYPES``."""
    for name, tensor in tensors:
        if tensor is not None:
            check_dtype(op, f"{name} has dtype", tensor.dtype)


def check_dtype(op: str, what: str, dtype: torch.dtype) -> None:
    """Raise ValueError, ``what`` before the dtype, for one that is not one of ``DTYPES``."""
    if dtype not in FLOATS:
        raise ValueError(f"{op}: {what} {dtype}: use {ANY_FLOAT}")


def check_indices(op: str, tensors: NamedOperands) -> None:
    """Raise ValueError for slot or offset tensors that are not int32 or int64."""
    for name, tensor in tensors:
        if tensor is not None and tensor.dtype not in INTEGERS:
            raise ValueError(
                f"{op}: {name} has dtype {tensor.dtype} but must be int32 or int64; convert it first"
            )


def slot_column(
    op: str, name: str, slots: torch.Tensor | None, sequences: int | None = None
) -> torch.Tensor | None:
    """``slots [S]``, also given as the column of a block table ``[S, 1]``; raise ValueError for a wider table.

    ``sequences``: cut to as many. vLLM and SGLang hand over the slots of a padded batch, more than it has sequences.
    """
    if slots is None:
        return None
    if sequences is not None and slots.dim() > 0 and slots.shape[0] > sequences:
        slots = slots[:sequences]
    if slots.dim() != 2:
        return slots
    if slots.shape[1] != 1:
        raise ValueError(
            f"{op}: {name} has shape {list(slots.shape)} but block tables are not supported; "
            "pass one slot a sequence, such as table[:, 0].contiguous()"
        )
    return slots[:, 0]


def without_gaps(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor.contiguous()``, or None; for short tensors whose stride the kernels do not take."""
    return None if tensor is None else tensor.contiguous()


def check_mask(op: str, name: str, tensor: Operand | None) -> None:
    """Raise ValueError for a mask that is not bool."""
    if tensor is not None and tensor.dtype != torch.bool:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype} but must be bool; convert it")


def check_device(op: str, device: torch.device, first: str, tensors: NamedOperands) -> None:
    """Raise ValueError for a tensor that is not on ``device``, where the argument named ``first`` is."""
    for name, tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first} is on {device}; move all arguments to one device"
            )


def not_supported(op: str, **remedies: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function so that these keywords of other libraries raise ValueError with their remedy.

    None passes: their callers spell out what they leave unused.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in remedies if kwargs else ():
                if name in kwargs and kwargs.pop(name) is not None:
                    raise ValueError(f"{op}: {name} is not supported; {remedies[name]}")
            return function(*args, **kwargs)

        return call

    return decorate


def refuse_grad(op: str, tensors: Iterable[Named]) -> None:
    """Raise RuntimeError where autograd would be expected to see through an op that has no backward."""
    if torch.is_grad_enabled():
        for name, tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires grad but this op has no backward; "
                    "call it under torch.no_grad() or detach its inputs"
                )
