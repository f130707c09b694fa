"""One sequence's state as a file: whole tensors, so that any number of ranks can read it, and the model's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tp_mamba.checkpoint.atomic import replacing_file
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.quoting import shown
from tp_mamba.state.identity import fingerprint
from tp_mamba.state.store import StackedState

_FORMAT = "tp-mamba state 2"
_NAMELESS = "tp-mamba state 1"  # the same, but it does not say which model it is of


def write_state(
    path: Path, model: str, stacked: Mapping[str, StackedState], tensors: dict[str, torch.Tensor]
) -> None:
    """Write ``tensors``, whole, to ``path``; a failure or a power cut leaves an older file as it was.

    Raises:
        ValueError: ``path`` is a folder.
        OSError: the file cannot be written.
    """
    if path.is_dir() or not path.name:
        raise ValueError(f"the state cannot be saved as {str(path)!r}: give the name of a file")
    metadata = {"format": _FORMAT, "model": model, "fingerprint": fingerprint(model, stacked.values())}
    try:
        with replacing_file(path) as partial:
            save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as failure:
        # safetensors reports a full disk as its own error: it is one of the file system's all the same.
        raise OSError(
            f"the state could not be written to {path}: {failure}; free some space or choose another path"
        ) from failure


def read_state(
    path: Path, model: str, stacked: Mapping[str, StackedState], tp: TensorParallel
) -> dict[str, torch.Tensor]:
    """This rank's part of the state in ``path``.

    Raises:
        ValueError: the file is missing, damaged, of another model, or of a wider dtype than ``stacked`` keeps.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            for name, each in stacked.items():
                _check_shape(path, file, name, each)
            if metadata.get("fingerprint") != fingerprint(model, stacked.values()):
                raise ValueError(
                    f"{path} is the state of another model ({shown(metadata.get('model') or 'not named')}; this "
                    f"one is {model or 'not named'}): load one that was saved by the same model"
                )
            return {name: _read(path, file, name, each, tp) for name, each in stacked.items()}
    except (OSError, SafetensorError) as failure:
        raise ValueError(
            f"the state file {path} cannot be read ({failure}): it is missing or damaged, save it again"
        ) from failure


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    found = metadata.get("format")
    if found == _NAMELESS:
        raise ValueError(
            f"{path} was saved by an earlier version, which did not write down whose state it is: save it again"
        )
    if found != _FORMAT:
        raise ValueError(f"{path} is not a state saved by MambaCache.save: pass a file that it wrote")


def _check_shape(path: Path, file: safe_open, name: str, each: StackedState) -> None:
    found = file.get_slice(name).get_shape() if name in file.keys() else "nothing"  # noqa: SIM118
    if found != list(each.shard.shape):
        raise ValueError(
            f"{path}: {name} holds {found}, this model's state is {list(each.shard.shape)}: load one of the same model"
        )


def _read(path: Path, file: safe_open, name: str, each: StackedState, tp: TensorParallel) -> torch.Tensor:
    shard, kept, view = each.shard, each.spec.dtype, file.get_slice(name)
    if shard.dim is None:
        local = view[:]
    else:
        before = (slice(None),) * shard.dim
        rows = [view[(*before, slice(span.start, span.stop))] for span in shard.spans(tp.rank, tp.size)]
        local = shard.assemble(rows, tp.rank, tp.size)
    if (
        local.dtype.is_floating_point != kept.is_floating_point
        or torch.promote_types(local.dtype, kept) != kept
    ):
        raise ValueError(
            f"{path}: {name} is {local.dtype}, this cache keeps {kept}, which would lose precision: make the "
            "cache in the wider dtype"
        )
    return local
