"""What a call does to memory: the operators that touch storage, the kernels they launch, the bytes they move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Step(NamedTuple):
    """One operator that touched storage; views and allocations are none."""

    operator: str
    launches: int
    """Triton kernels it launched, where they are interpreted; 0 for an operator of torch."""
    wide: int
    """Bytes of its tensors that have a dimension of at least ``width``, in and out, each once a kernel."""
    narrow: int
    """Bytes of the others. Neither counts integers, nor the tensors that are known beforehand."""


class Recorder(TorchDispatchMode):
    """Lists the steps of what runs under it; see :func:`recorded`."""

    def __init__(self, width: int, known: Iterable[torch.Tensor], *, inside: bool) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.known_bytes = 0
        """Bytes of the known tensors, each counted once per kernel that touches it."""
        self._width, self._inside = width, inside
        self._known = _storages(list(known))
        self._launches: list[Any] = []
        self._interpreting = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._interpreting:
            return func(*args, **kwargs)
        name = func._schema.name
        if func.namespace == "tp_mamba" and self._inside:
            outer, self._launches = self._launches, []
            with self:
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            launches, self._launches = self._launches, outer
            if launches:  # else it has called other operators, which are steps of their own
                self._note(name, len(launches), launches)
            return result
        if func is torch.ops.aten.mm.dtype:  # serves GPUs alone
            x, weight, dtype = args
            result = x.to(dtype) @ weight.to(dtype)
        else:
            result = func(*args, **kwargs)
        made = _storages(result)
        is_view = bool(made) and made <= _storages((args, kwargs)) and not func._schema.is_mutable
        if not is_view and "empty" not in name:
            self._note(name, 0, [(args, kwargs, result)])
        return result

    def launch(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Interpret a kernel: its arguments are noted, and nothing that the interpreter itself does."""
        self._launches.append((args, kwargs))
        self._interpreting = True
        try:
            return run(*args, **kwargs)
        finally:
            self._interpreting = False

    def _note(self, operator: str, launches: int, passes: Sequence[Any]) -> None:
        """``passes``: what one kernel each was given and returned."""
        wide = narrow = 0
        for tree in passes:
            touched = {
                (x.data_ptr(), x.shape, x.stride()): x
                for x in tree_leaves(tree)
                if isinstance(x, torch.Tensor) and x.is_floating_point()
            }
            for x in touched.values():
                size = x.numel() * x.element_size()
                if x.untyped_storage().data_ptr() in self._known:
                    self.known_bytes += size
                elif max(x.shape, default=0) >= self._width:
                    wide += size
                else:
                    narrow += size
        self.steps.append(Step(operator, launches, wide, narrow))


def _storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


@contextlib.contextmanager
def recorded(width: int, known: Iterable[torch.Tensor]) -> Iterator[Recorder]:
    """The steps of the body, in which an operator of ours is one."""
    with Recorder(width, known, inside=False) as recorder:
        yield recorder


@contextlib.contextmanager
def recorded_as_on_a_gpu(width: int, known: Iterable[torch.Tensor]) -> Iterator[Recorder]:
    """The steps of the body on the way that a GPU takes, its Triton kernels interpreted, on CPU tensors.

    The process must run under ``TRITON_INTERPRET=1``. Our operators are entered: what one does to tensors in torch is
    a step of its own, before the operator's. Products with another dtype of the result, which torch has for GPUs
    alone, are stood in for.
    """
    from triton.runtime.interpreter import GridExecutor

    recorder = Recorder(width, known, inside=True)
    interpret = GridExecutor.__call__
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True, create=True),
        mock.patch.object(
            GridExecutor, "__call__", lambda *args, **kwargs: recorder.launch(interpret, *args, **kwargs)
        ),
        recorder,
    ):
        yield recorder
