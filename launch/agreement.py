"""What every rank must have been given alike: torchrun's ranks on other hosts have words and files of their own."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable

import torch

from tp_mamba.checkpoint.files import MANIFEST
from tp_mamba.checkpoint.sources.manifest import read_manifest
from tp_mamba.config import MambaConfig
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors


def agree_on_arguments(tp: TensorParallel, args: argparse.Namespace, names: Iterable[str]) -> None:
    """Compare the arguments ``names`` and the checkpoint's config.json over all ranks, before any weight is read.

    Raises:
        ValueError: on every rank; the sentence names the first that differs, and both values.
    """
    given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    config = MambaConfig.from_pretrained(args.checkpoint)
    tp.same_everywhere(**given, **{"config.json of the checkpoint": config})


def agree_on_weights(tp: TensorParallel, model: MambaForCausalLM) -> str:
    """Compare what the ranks have loaded.

    That is the weights that each holds whole, which are the norms', and of per-rank files the id of their writing.

    Returns:
        A digest of the former, which is the same at every number of ranks.

    Raises:
        ValueError: on every rank, if the checkpoints differ.
    """
    digest = hashlib.sha256()
    for tensor in sharded_tensors(model):
        if tensor.shard.dim is None:
            whole = tensor.param.detach().cpu().contiguous()
            digest.update(tensor.name.encode() + whole.view(torch.uint8).numpy().tobytes())
    manifest = None if model.checkpoint_folder is None else model.checkpoint_folder / MANIFEST
    writing = read_manifest(manifest).writing if manifest is not None and manifest.is_file() else None
    found = {
        "the content of the checkpoint": digest.hexdigest(),
        "the run of tp-mamba shard that wrote the checkpoint": writing,
    }
    tp.same_everywhere(**found)
    return digest.hexdigest()
