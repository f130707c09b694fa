"""Cutting a checkpoint into one file per rank, and putting it together again.

One process, files only: a slice at a time is in memory, and no bit of any tensor changes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from tp_mamba.checkpoint.config import read_config
from tp_mamba.checkpoint.dtype import checkpoint_dtype
from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.files import CONFIG, MANIFEST, copy_companions, write_json
from tp_mamba.checkpoint.location import resolve
from tp_mamba.checkpoint.matching import Entry, Matching, match, verify_tied
from tp_mamba.checkpoint.progress import Progress, counter
from tp_mamba.checkpoint.refusals import refuse_other_depth
from tp_mamba.checkpoint.replace import refuse_taken, replacing
from tp_mamba.checkpoint.safetensors_writer import SafetensorsWriter, Spec, nbytes, write_order
from tp_mamba.checkpoint.save import plan_files, write_description
from tp_mamba.checkpoint.sources.manifest import Manifest, shard_file_name
from tp_mamba.checkpoint.sources.open import TensorSource, open_source
from tp_mamba.checkpoint.sources.shards import local_shape
from tp_mamba.models.base import CausalLM
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.registry import get_family
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors
from tp_mamba.quoting import shown_path


def shard_checkpoint(
    folder: str | Path,
    out: str | Path,
    tp_size: int,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the checkpoint ``folder`` (any supported layout, or a hub name) to ``out``, one file for each rank.

    Loading those files with ``tp_size`` ranks, each rank reads its own file and no other; any other number of
    ranks may load them too.

    Args:
        overwrite: whether ``out`` may hold a checkpoint, which the new one replaces when it is complete.

    Raises:
        CheckpointError: the checkpoint is damaged, is not of its config.json, or has fewer channels or vocabulary
            rows than ranks; ``out`` is ``folder``, or holds something that may not be replaced.
        CheckpointWriteError: ``out`` cannot be written; what stood there stays.
    """
    origin = _resolve_beside(folder, out, overwrite=overwrite)
    config = read_config(origin, MambaConfig)
    _check_rank_count(origin, config, tp_size)
    source, matching = _open(origin, config)
    entries = {entry.name: entry for entry in matching}
    dtypes = {name: entry.dtype(source) for name, entry in entries.items()}
    ranks: list[dict[str, Spec]] = [
        {name: (dtypes[name], local_shape(entry.shard, rank, tp_size)) for name, entry in entries.items()}
        for rank in range(tp_size)
    ]
    report = counter(
        "writing shards", sum(nbytes(spec) for specs in ranks for spec in specs.values()), progress
    )
    manifest = Manifest(
        tp_size=tp_size, shards={name: entry.shard for name, entry in entries.items()}, dtypes=dtypes
    )
    with replacing(out) as new:
        write_json(new / CONFIG, dataclasses.replace(config, dtype=_declared(config, source)).to_dict())
        write_json(new / MANIFEST, manifest.to_dict())
        copy_companions(origin, new)
        for rank, specs in enumerate(ranks):
            path = new / shard_file_name(rank, tp_size)
            with SafetensorsWriter(path, specs, manifest.stamp(rank)) as writer:
                for name in write_order(specs):
                    writer.write(name, _read_rank(source, entries[name], rank, tp_size))
                    report(nbytes(specs[name]))


def merge_checkpoint(
    folder: str | Path, out: str | Path, progress: Progress | None = None, *, overwrite: bool = False
) -> None:
    """Write the checkpoint ``folder``, of per-rank files or of any other layout, to ``out`` in the -hf layout.

    Args:
        overwrite: whether ``out`` may hold a checkpoint, which the new one replaces when it is complete.

    Raises:
        CheckpointError: the checkpoint is damaged or is not of its config.json; ``out`` is ``folder``, or holds
            something that may not be replaced.
        CheckpointWriteError: ``out`` cannot be written; what stood there stays.
    """
    origin = _resolve_beside(folder, out, overwrite=overwrite)
    config = read_config(origin, MambaConfig)
    source, matching = _open(origin, config)
    entries = {name: (entry, i) for entry in matching for i, name in enumerate(entry.filed.sources)}
    specs: dict[str, Spec] = {
        name: (entry.dtype(source), entry.filed.source_shapes()[i]) for name, (entry, i) in entries.items()
    }
    files = plan_files(specs)
    report = counter("merging", sum(map(nbytes, specs.values())), progress)
    with replacing(out) as new:
        write_description(new, config, _declared(config, source), files, specs, origin)
        for file, names in files.items():
            wanted = {name: specs[name] for name in names}
            with SafetensorsWriter(new / file, wanted) as writer:
                for name in write_order(wanted):
                    writer.write(name, _read_source(source, *entries[name]))
                    report(nbytes(specs[name]))


def _resolve_beside(folder: str | Path, out: str | Path, *, overwrite: bool) -> Path:
    """The folder to read, once it is sure that writing ``out`` destroys nothing."""
    refuse_taken(out, folder, overwrite=overwrite)  # before a name is downloaded
    origin = resolve(folder)
    refuse_taken(out, origin, overwrite=overwrite)  # what the name stands for may be that very folder
    return origin


def _check_rank_count(origin: Path, config: MambaConfig, n: int) -> None:
    """The limit of the layers themselves: more ranks could not load what was cut."""
    channels, rows = config.intermediate_size, config.vocab_size
    if not 1 <= n <= min(channels, rows):
        raise CheckpointError(
            f"cannot cut {shown_path(origin)} for {n} ranks: it has {channels} channels and {rows} vocabulary rows, "
            f"choose 1 to {min(channels, rows)} ranks"
        )


def _open(folder: Path, config: MambaConfig) -> tuple[TensorSource, Matching]:
    source = open_source(folder)
    refuse_other_depth(config, source)
    model = CausalLM(config, tp=TensorParallel.virtual(0, 1), device="meta")
    matching = match(sharded_tensors(model), source, get_family(config.model_type))
    verify_tied(source, matching, 0, 1)
    return source, matching


def _declared(config: MambaConfig, source: TensorSource) -> torch.dtype:
    """The dtype for config.json: that of the original, by which it is loaded; else (raw files) that of the weights."""
    return config.dtype or checkpoint_dtype(source)


def _read_rank(source: TensorSource, entry: Entry, rank: int, n: int) -> torch.Tensor:
    rows = entry.read_spans(source, rank, n)
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=entry.shard.dim or 0)


def _read_source(source: TensorSource, entry: Entry, i: int) -> torch.Tensor:
    """Tensor number ``i`` of those that a full checkpoint keeps for ``entry``."""
    if len(entry.stored_names) == len(entry.filed.sources):
        return source.read_all(entry.stored_names[i])
    return entry.filed.split_sources(source.read_all(entry.stored_names[0]))[i].contiguous()
