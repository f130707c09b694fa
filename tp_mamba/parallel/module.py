"""A module whose parameters are cut over the ranks: its table, and the way in and out of each parameter.

The table belongs to the module, not to its parameters, so it survives whatever replaces them: ``deepcopy``,
pickling, ``to_empty``, ``.to()``, ``load_state_dict``, a new ``nn.Parameter`` under the old name. What a parameter
itself carries, vLLM's ``param.weight_loader``, is attached again where its module learns that it can be another.
It does not learn of ``torch.utils.swap_tensors`` called on a parameter, which hands the loader to the other tensor:
:meth:`ShardedModule.load_full` fills the new one then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tp_mamba.kernels.common.dtypes import DTYPES, FLOATS, wide_dtype
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.parallel.sharding import Shard


class WeightLoader:
    """``param.weight_loader(param, loaded_weight, shard_id=None)``: fill ``param`` from a full tensor, as in vLLM.

    It holds its module weakly, and is pickled without it: pickle writes the attributes of a parameter before the
    parameter itself, so a reference from here back to the module would never come to an end. The module attaches
    new loaders when it is unpickled.
    """

    __slots__ = ("_attribute", "_module")

    def __init__(self, module: ShardedModule | None = None, attribute: str = "") -> None:
        self._module = None if module is None else weakref.ref(module)
        self._attribute = attribute

    def __call__(self, param: torch.Tensor, loaded_weight: torch.Tensor, shard_id: int | None = None) -> None:
        """Take this rank's part of ``loaded_weight``, the full tensor, or piece ``shard_id`` of it, as a file has it.

        Args:
            param: the parameter that this loader was found on.
            loaded_weight: of the shape of the full tensor, in float32, bfloat16, float16 or float64, or in the
                parameter's own dtype. Others, such as float8, stand for other numbers than theirs.
            shard_id: with a number, ``loaded_weight`` is that piece alone: 0 or 1 for the halves of in_proj.

        Raises:
            ValueError: another shape or kind of dtype, a piece that does not exist, or a parameter that its module
                no longer holds.
        """
        module = None if self._module is None else self._module()
        if module is None or module._parameters.get(self._attribute) is not param:
            raise ValueError(
                f"got a parameter that is no module's {self._attribute or 'parameter'} any more: take the parameter "
                "from the module, such as mixer.D, and load through that"
            )
        module.load_full(self._attribute, loaded_weight, shard_id)

    def belongs_to(self, param: torch.Tensor) -> bool:
        """Whether a live module holds ``param`` under the name that this loader fills."""
        module = None if self._module is None else self._module()
        return module is not None and module._parameters.get(self._attribute) is param

    def __reduce__(self) -> tuple[type[WeightLoader], tuple[()]]:
        return WeightLoader, ()


class ShardedModule(nn.Module):
    """A module with a table of how its parameters are cut.

    Attributes:
        tp: the ranks.
        prefix: its name in checkpoints and messages.
        shards: attribute -> :class:`~tp_mamba.parallel.sharding.Shard`.
        file_dtypes: attribute -> the dtype that its tensor had in the file it was loaded from.
    """

    shards: dict[str, Shard]
    file_dtypes: dict[str, torch.dtype]

    def __init__(self, tp: TensorParallel | None = None, prefix: str = "") -> None:
        super().__init__()
        self.tp, self.prefix = checked(tp), prefix
        self.shards, self.file_dtypes = {}, {}

    def add_parameter(
        self,
        name: str,
        shard: Shard,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> nn.Parameter:
        """Declare ``name`` in the table and register this rank's part of it, uninitialised, as a parameter."""
        self.shards[name] = shard
        dtype = dtype or torch.get_default_dtype()
        if shard.wide:
            dtype = wide_dtype(dtype)
        local = torch.empty(shard.local_shape(self.tp.size), dtype=dtype, device=device)
        param = nn.Parameter(local, requires_grad=dtype.is_floating_point)
        setattr(self, name, param)
        return param

    def load_shard(self, name: str, local: torch.Tensor) -> None:
        """Fill ``name`` from this rank's part of the file's tensor, :meth:`Shard.local_shape`."""
        with torch.no_grad():
            getattr(self, name).copy_(local)

    def read_shard(self, name: str) -> torch.Tensor:
        """This rank's part of ``name`` as a file would hold it, padding included."""
        return getattr(self, name).detach()

    def load_full(self, name: str, full: torch.Tensor, piece: int | None = None) -> None:
        """Fill ``name`` from the full tensor or one piece of it; refusals as :meth:`WeightLoader.__call__`."""
        shard, held = self.shards[name], getattr(self, name)
        called = f"{self.prefix}.{name}".lstrip(".")
        if piece is not None and (shard.dim is None or piece not in range(len(shard.pieces))):
            count = len(shard.pieces)
            raise ValueError(
                f"{called}: got shard_id {piece!r}, "
                + (f"it has pieces 0 to {count - 1}" if count > 1 else "it is one piece: leave shard_id out")
            )
        expected = shard.shape if piece is None else shard.piece_shape(piece)
        if tuple(full.shape) != expected:
            raise ValueError(
                f"{called}: got a tensor of shape {list(full.shape)}, expected the full {list(expected)}; pass the "
                "whole tensor of the checkpoint, the loader takes this rank's part"
            )
        if full.dtype != held.dtype and not {full.dtype, held.dtype} <= FLOATS:
            raise ValueError(
                f"{called}: got a tensor in {full.dtype} for a parameter in {held.dtype}: convert it to one of "
                f"{', '.join(DTYPES)} first, with its scales if it is quantised"
            )
        rank, n = self.tp.rank, self.tp.size
        if piece is None:
            self.load_shard(name, shard.shard(full, rank, n))
        else:
            local = self.read_shard(name).clone()
            shard.replace_piece(local, piece, full, rank, n)
            self.load_shard(name, local)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._attach_loaders()

    def wide_tensors(self) -> list[torch.Tensor]:
        """What is held in at least float32, whatever the rest of the module is cast to."""
        return [getattr(self, name) for name, shard in self.shards.items() if shard.wide]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ShardedModule:
        """As ``nn.Module``: what ``.to()``, ``.half()`` and others do. :meth:`wide_tensors` stay wide."""
        wide = {id(tensor) for tensor in self.wide_tensors()}

        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            if id(tensor) not in wide or applied.dtype == wide_dtype(applied.dtype):
                return applied
            return tensor.to(applied.device, wide_dtype(applied.dtype))

        # Children keep their own wide tensors.
        for child in self.children() if recurse else ():
            child._apply(fn)
        super()._apply(keep_wide, recurse=False)
        self._attach_loaders()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._attach_loaders()  # it can have swapped the parameters with those of the state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach_loaders()

    def _attach_loaders(self) -> None:
        for name in self.shards:
            param = self._parameters.get(name)
            if param is None:
                continue
            loader = getattr(param, "weight_loader", None)
            if not (isinstance(loader, WeightLoader) and loader.belongs_to(param)):
                param.weight_loader = WeightLoader(self, name)  # type: ignore[attr-defined]
