"""Writing a model back as one full checkpoint in the -hf layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Final

import torch

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import CONFIG, SAFETENSORS, copy_companions, write_json
from tp_mamba.checkpoint.names import filed
from tp_mamba.checkpoint.replace import replacing, writing
from tp_mamba.checkpoint.safetensors_writer import SafetensorsWriter, Spec, nbytes, write_order
from tp_mamba.kernels.common.dtypes import wide_dtype
from tp_mamba.models.base import CausalLM
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.registry import get_family
from tp_mamba.parallel.sharding import Shard, ShardedTensor, sharded_tensors

MAX_SHARD_BYTES: Final = 5 * 10**9
"""Files larger than this are split, as the hub's own tools do."""


def save_model(model: CausalLM, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write ``model`` to ``folder`` as its family's files are; every rank calls this, rank 0 writes.

    Tensors are gathered one at a time; halves are merged and padding is trimmed. A, D and dt bias are written in
    the dtype they were loaded from, so that loading and saving changes no bit, or as they are held where they take
    gradients; all else in the model's dtype.
    The folder takes the place of an older checkpoint only when it is complete.

    Args:
        max_shard_bytes: how large one safetensors file may be; a larger tensor gets a file of its own.

    Raises:
        CheckpointError: ``folder`` is something other than a checkpoint, or a parameter has values that a checkpoint
            cannot hold (an ``A`` that is not negative).
        CheckpointWriteError: (an OSError) it cannot be written; what stood there stays.
        RankFailedError: on the other ranks, when a rank failed.
    """
    tp, target = model.tp, Path(folder)
    with tp.agreed():
        for tensor in sharded_tensors(model):
            _refuse_unwritable(tensor)
    family = get_family(model.config.model_type)
    tensors: dict[str, tuple[ShardedTensor, Shard, int]] = {}
    for tensor in sharded_tensors(model):
        how = filed(tensor, family)
        tensors |= {name: (tensor, how, i) for i, name in enumerate(how.sources)}
    specs = {name: (_file_dtype(t), how.source_shapes()[i]) for name, (t, how, i) in tensors.items()}
    files = plan_files(specs, max_shard_bytes)
    dtype = _declared_dtype(
        {specs[name][0] for name, (tensor, *_) in tensors.items() if not tensor.shard.wide}
    )
    with ExitStack() as stack:
        new: Path | None = None
        with tp.agreed():
            if tp.rank == 0:
                new = stack.enter_context(replacing(target))
                write_description(
                    new, model.config, dtype or model.dtype, files, specs, model.checkpoint_folder
                )
        for name, held in files.items():
            _write_file(
                model,
                target,
                new / name if new is not None else None,
                {t: specs[t] for t in held},
                tensors,
            )
        with tp.agreed():
            stack.close()


def plan_files(specs: Mapping[str, Spec], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File names in the -hf layout, each with its tensors in the model's order."""
    groups: list[list[str]] = [[]]
    room = max_bytes
    for name, spec in specs.items():
        if groups[-1] and nbytes(spec) > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= nbytes(spec)
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_description(
    folder: Path,
    config: MambaConfig,
    dtype: torch.dtype,
    files: Mapping[str, list[str]],
    specs: Mapping[str, Spec],
    origin: Path | None,
) -> None:
    """Write what stands beside the weights: config.json, the index of several files, the tokenizer of ``origin``."""
    write_json(folder / CONFIG, dataclasses.replace(config, dtype=dtype).to_dict())
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(map(nbytes, specs.values()))
        write_json(
            folder / f"{SAFETENSORS}.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    if origin is not None:
        copy_companions(origin, folder)


def _write_file(
    model: CausalLM,
    target: Path,
    path: Path | None,
    specs: Mapping[str, Spec],
    tensors: Mapping[str, tuple[ShardedTensor, Shard, int]],
) -> None:
    """Gather the tensors of one file on every rank and write them on rank 0, the one with a ``path``.

    A failed write does not end rank 0's part in the gathers, which the other ranks are waiting in; all stop
    together at the end of the file.
    """
    failure: BaseException | None = None
    with ExitStack() as stack:
        writer: SafetensorsWriter | None = None
        if path is not None:
            try:
                writer = stack.enter_context(SafetensorsWriter(path, specs))
            except Exception as error:  # whatever it was, the others must not wait for this rank
                failure = error
        for name in write_order(specs):
            tensor, how, i = tensors[name]
            full = _gather(tensor, specs[name][0])
            if writer is None or failure is not None:
                continue
            try:
                writer.write(name, how.split_sources(full)[i].cpu().contiguous())
            except Exception as error:
                failure = error
        with model.tp.agreed(), writing(target):
            if failure is not None:
                raise failure
            stack.close()


def _gather(tensor: ShardedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The full tensor as a checkpoint holds it; on rank 0 (elsewhere the padded gathering, which nobody reads)."""
    shard, tp = tensor.shard, tensor.tp
    local = tensor.read().to(dtype)
    if shard.dim is None:
        return local
    gathered = tp.all_gather(local, dim=shard.dim)
    return shard.merge(gathered.chunk(tp.size, dim=shard.dim)) if tp.rank == 0 else gathered


def _refuse_unwritable(tensor: ShardedTensor) -> None:
    """Refuse numbers that the file would hold as NaN: a checkpoint has A_log, and A = -exp(A_log) is negative."""
    held, written = tensor.param.detach(), tensor.read()
    if written.data_ptr() == held.data_ptr() or not written.is_floating_point():
        return  # written as it is held
    lost = written.isnan().logical_and_(held.isnan().logical_not_())
    if lost.any():
        name = f"{tensor.path}.{tensor.attribute}".lstrip(".")
        raise CheckpointError(
            f"{name} holds {held[lost][0].item():g}, which {tensor.names[0]} cannot stand for ({int(lost.sum())} such "
            "in all), and nothing was written: correct it first (A is -exp(A_log), always negative)"
        )


def _declared_dtype(written: set[torch.dtype]) -> torch.dtype | None:
    """The dtype for config.json, by which the weights will be loaded: the narrowest that holds all of them.

    A, D and dt bias, which are wider than the rest, have no say. None where no weight is of a floating dtype.
    """
    floating = [dtype for dtype in written if dtype.is_floating_point and dtype.itemsize > 1]
    return reduce(torch.promote_types, floating) if floating else None


def _file_dtype(tensor: ShardedTensor) -> torch.dtype:
    held = tensor.param.dtype
    if not tensor.shard.wide:
        return held
    loaded = None if tensor.param.requires_grad else tensor.file_dtype  # trained: no longer what was loaded
    return loaded or wide_dtype(held)
