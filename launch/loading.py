"""What verbs that generate share: from arguments to a tokenizer and a model on every rank."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from tp_mamba.config import MambaConfig
from tp_mamba.engine.memory import Needs, agree_on_limits
from tp_mamba.engine.room import MAX_BATCH_SIZE
from tp_mamba.launch.agreement import agree_on_weights
from tp_mamba.launch.arguments import torch_dtype
from tp_mamba.launch.console import progress_bar, tell
from tp_mamba.launch.verbs.plan import planned_dtype
from tp_mamba.model import MambaForCausalLM
from tp_mamba.options import CacheConfig
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import sharded_tensors
from tp_mamba.text.chat import load_chat_template
from tp_mamba.text.tokenizer import load_tokenizer

PromptEncoder = Callable[[str], list[int]]
"""Makes a prompt's token ids of its text."""


def load_encoder(args: argparse.Namespace, tp: TensorParallel) -> tuple[PromptEncoder, Tokenizer]:
    """How prompts become ids, with ``--chat`` as a conversation's first turn, and the tokenizer that does it.

    Raises:
        ValueError: there is no tokenizer, or with ``--chat`` no template; the encoder raises it for a prompt that the
            template refuses.
        RankFailedError: it failed on another rank.
    """
    place = args.tokenizer or args.checkpoint
    tokenizer = load_tokenizer(place, tp)
    if not args.chat:
        return lambda text: list(tokenizer.encode(text).ids), tokenizer
    template = load_chat_template(place, tp)

    def encode_turn(text: str) -> list[int]:
        turn = template.render([{"role": "user", "content": text}])
        return list(tokenizer.encode(turn, add_special_tokens=False).ids)  # the template has written them

    return encode_turn, tokenizer


def limits_before_loading(
    args: argparse.Namespace, tp: TensorParallel, at_most: int | None = None
) -> dict[str, Any]:
    """What an engine is to be given of ``--max-batch-size`` and the like, once memory has been looked at.

    Rank 0 tells what was lowered. Every rank calls this, and gets the same.

    Args:
        at_most: as many sequences as will ever run at a time, if that is known.

    Raises:
        ValueError: the memory has no room for the weights and one sequence, or the checkpoint is no model of this
            package.
        RankFailedError: another rank could not read the checkpoint's files.
    """
    with tp.agreed():
        config = MambaConfig.from_pretrained(args.checkpoint)
        dtype = torch_dtype(args.dtype) or planned_dtype(args.checkpoint, config.dtype)[0]
        shapes = MambaForCausalLM(config, TensorParallel.virtual(tp.rank, tp.size), dtype, "meta")
        weights = sum(tensor.param.nbytes for tensor in sharded_tensors(shapes))
        needs = Needs.of(shapes, weights=weights, captures=tp.device.type == "cuda" and not args.eager)
    asked = args.max_batch_size or at_most or MAX_BATCH_SIZE
    limits = agree_on_limits(
        tp,
        needs,
        device=tp.device,
        max_batch_size=min(asked, at_most or asked),
        max_prefill_tokens=args.max_prefill_tokens,
        fraction=args.memory_fraction,
    )
    if limits.note is not None and tp.rank == 0:
        tell(args.verb, "note", limits.note)
    return {
        "max_batch_size": limits.max_batch_size,
        "max_prefill_tokens": limits.max_prefill_tokens,
        "memory_fraction": args.memory_fraction,
    }


def load_model(args: argparse.Namespace, tp: TensorParallel) -> tuple[MambaForCausalLM, str]:
    """This rank's part of the model, with a bar on rank 0, and a digest of the weights that is the same on all ranks.

    Raises:
        ValueError: the checkpoint is no model of this package, or the ranks have different ones.
        RankFailedError: another rank could not load its part.
    """
    with progress_bar(tp.rank == 0) as progress:
        model = MambaForCausalLM.from_pretrained(
            args.checkpoint, tp=tp, dtype=torch_dtype(args.dtype), device=tp.device, progress=progress
        )
    return model, agree_on_weights(tp, model)


def describe(model: MambaForCausalLM) -> dict[str, Any]:
    """What runs where: ranks, backend, device, dtype, parameters of the whole model, bytes on each rank."""
    tensors = list(sharded_tensors(model))
    return {
        "ranks": model.tp.size,
        "backend": model.tp.backend,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(math.prod(tensor.shard.shape) for tensor in tensors),
        "bytes_per_rank": model.tp.all_gather_object(sum(tensor.param.nbytes for tensor in tensors)),
    }


def cache_config_of(args: argparse.Namespace) -> CacheConfig:
    """Whether prompts begin with the states of prompts before them."""
    return CacheConfig(
        enable_prefix_caching=args.enable_prefix_caching, mamba_block_size=args.mamba_block_size
    )
