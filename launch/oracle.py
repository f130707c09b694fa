"""What logits are compared with: transformers' own, in float32 and float64, of a checkpoint that it loaded whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tp_mamba.quoting import shown


class OracleError(ValueError):
    """transformers is no reference for this checkpoint; the message says why."""


class _InFloat64(TorchFunctionMode):
    """Inside, what asks for float32 gets float64: a model's own casts do not round."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        given = {name: torch.float64 if v is torch.float32 else v for name, v in (kwargs or {}).items()}
        return func(*args, **given)


def transformers_logits(folder: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits ``[L, V]`` of ``ids`` ``[1, L]`` in float32 or float64: one full forward on the CPU, without a cache.

    A CPU is where transformers takes its plain torch path; its own cached continuation of several tokens is
    not a reference for Mamba-1. Its casts to float32 are lifted where ``dtype`` is float64.

    Raises:
        OracleError: transformers refused the checkpoint, filled weights at random that it did not find, or left some
            of the file's unread.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # whatever its parsers and libraries raise
        reason = f"{type(error).__name__}: {shown(error)}"
        raise OracleError(f"transformers does not load this checkpoint ({reason})") from error
    for kind, sentence in (
        ("missing_keys", "did not find {} of its weights in the checkpoint and fills them at random"),
        ("mismatched_keys", "found {} weights of another shape and fills them at random"),
        ("unexpected_keys", "left {} of the checkpoint's tensors unread"),
    ):
        if names := sorted(map(str, loaded[kind])):
            raise OracleError(f"transformers {sentence.format(len(names))}, {names[0]} among them")
    with torch.inference_mode():
        if dtype is torch.float64:
            with _InFloat64():
                logits = model.eval()(ids, use_cache=False).logits
        else:
            logits = model.eval()(ids, use_cache=False).logits
    if logits.dtype is not dtype:
        raise OracleError(f"transformers computes {logits.dtype} where {dtype} was asked for")
    return logits[0]
