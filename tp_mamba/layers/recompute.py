"""What a backward pass computes again instead of having kept it: cheap results, or a whole layer.

``checkpoint_level`` of a model says which, under mamba_ssm's numbers:

=====  ======================================  ===================================================================
level  computed again                          kept per token and layer, in elements
=====  ======================================  ===================================================================
0      nothing                                 x, z, u, delta, y (each D/n); the normed input (H); dt, B, C;
                                               float32: the residual (H) and the scan's saved states (D/n)
1      the convolution and the time steps      the same without u and delta
2      the whole layer, from its input on      the input and the residual (2 H), x_proj's sum (R + 2 N)
=====  ======================================  ===================================================================

Where float32 parameters meet 16-bit activations, levels 0 and 1 also keep the rounded copies of the weights.

Everything is deterministic, so the gradients are the same bits at every level. The sums over ranks of the first pass
are kept and not taken again: there are as many collectives at every level.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tp_mamba.parallel.collectives import ReduceTape

LEVELS: Final = (0, 1, 2)


def check_level(level: int) -> int:
    """``level`` itself.

    Raises:
        ValueError: there is no such level.
    """
    if level not in LEVELS or isinstance(level, bool):
        raise ValueError(
            f"got checkpoint_level {level!r}: 0 keeps everything for the backward, 1 computes the convolution and the "
            "time steps again, 2 whole layers"
        )
    return level


def recomputed_layer(layer: Callable[..., Any], *args: Any) -> Any:
    """``layer(*args)``, which keeps nothing but ``args`` and its sums over ranks, and runs again in backward."""
    tape = ReduceTape()
    return checkpoint(
        layer,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (tape.record(), tape.replay()),
    )


class _Call:
    """One cheap call, whose result is computed again when the first of its readers asks, and kept for the others."""

    def __init__(self, again: Callable[[], torch.Tensor]) -> None:
        self._again = again
        self.readers = self._left = 0
        self._result: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        if self._result is None:
            with torch.no_grad():
                self._result, self._left = self._again(), self.readers
        result, self._left = self._result, self._left - 1
        if self._left == 0:
            self._result = None
        return result


class _Saved:
    """A tensor that some operator saved: itself, or the call that gives it and its place in what that gives."""

    __slots__ = ("call", "geometry", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.call: _Call | None = None
        self.geometry = (tensor.size(), tensor.stride(), tensor.storage_offset())

    def read(self) -> torch.Tensor:
        if self.call is None:
            assert self.tensor is not None
            return self.tensor
        return self.call.read().as_strided(*self.geometry)


class Recompute:
    """While entered, operators that save what was given to :meth:`offer`, or a view of it, save the call instead."""

    def __init__(self, *, active: bool) -> None:
        self._hooks = saved_tensors_hooks(self._pack, _Saved.read) if active else None
        self._saved: list[_Saved] = []
        self._calls: dict[int, _Call] = {}
        self._results: list[torch.Tensor] = []

    def offer(self, result: torch.Tensor, again: Callable[[], torch.Tensor]) -> None:
        """Have ``result`` computed again by ``again``, which is called without a gradient to track, if active."""
        if self._hooks is not None:
            self._calls[_place(result)] = _Call(again)
            self._results.append(result)  # its memory is not given to another tensor before the exit

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.append(saved)
        return saved

    def __enter__(self) -> Recompute:
        if self._hooks is not None:
            self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__(kind, error, trace)
        # Only now: an operator may save its own result, before anybody knows whose it is.
        for saved in self._saved:
            assert saved.tensor is not None
            call = self._calls.get(_place(saved.tensor))
            if call is not None and saved.tensor.untyped_storage().data_ptr():
                saved.call, saved.tensor = call, None
                call.readers += 1
        self._saved, self._calls, self._results = [], {}, []


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
