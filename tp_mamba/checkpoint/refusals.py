"""Why the tensors of a checkpoint are not those of a model, in one sentence whose remedy fits the cause.

The same differences have many causes: a wrong config.json, quantised weights, an adapter, another kind of head, a
wrapper that left its name in every tensor's. So what is there is looked at before anything is advised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tp_mamba.checkpoint.dtype import quantized_tensor
from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.names import Naming
from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.kernels.common.dtypes import DTYPES
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.names import LM_HEAD
from tp_mamba.models.registry import get_family
from tp_mamba.quoting import shown

_ADAPTER: Final = re.compile(
    r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|ia3_l|oft_r|hada_w1_a)(\.|$)|prompt_"
)
_QUANTIZED: Final = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|nested_absmax|quant_state\..*|SCB|weight_format|weight_scale"
    r"|weight_scale_inv|weight_packed|weight_zero_point|input_scale)$"
)
_CLASSIFIER: Final = re.compile(r"^(score|classifier|classification_head|qa_outputs|v_head|value_head)\.")
_MAMBA_2: Final = re.compile(r"\.mixer\.(dt_bias|norm\.weight)$")
_WRAPPERS: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
_LAYER: Final = re.compile(r"\.layers\.(\d+)\.")

_USE_ITS_CONFIG: Final = "use the config.json that belongs to these weights"
_DEQUANTIZE: Final = "give the checkpoint it was made from, or dequantise it with the program that made it"


@dataclass(frozen=True, slots=True)
class Differences:
    """What of a source and a model does not fit, each list in the order of the model or of the source."""

    duplicate: list[tuple[str, str]]
    """Two names of one tensor."""
    missing: list[str]
    """Tensors that the model has and the source does not."""
    unknown: list[str]
    """Tensors that the source has and the model does not."""
    misshapen: list[str]
    """Tensors of another shape than the model's."""
    wrong_dtype: list[str]
    """Tensors of a dtype that the model's parameter cannot take."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape that the model asks of every tensor that was found, by its name in the source."""


def refusal_of(found: Differences, source: TensorSource, naming: Naming) -> str | None:
    """Why a loader refuses ``source``; None where nothing differs."""
    if found.duplicate:
        first, second = map(shown, found.duplicate[0])
        return f"the checkpoint holds both {first} and {second}, two names of one tensor: remove one"
    if not (found.missing or found.unknown or found.misshapen or found.wrong_dtype):
        return None
    return _quantized(found, source) or _foreign(found, naming) or _other_sizes(found, source)


def _quantized(found: Differences, source: TensorSource) -> str | None:
    supported = ", ".join(DTYPES)
    if found.wrong_dtype:
        name = found.wrong_dtype[0]
        quantized = quantized_tensor(source)
        remedy = "convert the checkpoint to one of them"
        if quantized is not None:
            remedy, name = f"its weights are quantised, so {_DEQUANTIZE}", quantized[0]
        return f"{shown(name)} has dtype {_dtype(source, name)}, supported are {supported}: {remedy}"
    for name in found.unknown:
        if _QUANTIZED.search(name):
            return f"the checkpoint holds {shown(name)}, part of a quantised weight: {_DEQUANTIZE}"
    return None


def _foreign(found: Differences, naming: Naming) -> str | None:
    """Tensors of something that is not, or not only, a model of this family."""
    for name in found.unknown:
        bare = naming.file_name(name)
        if _ADAPTER.search(name):
            return (
                f"the checkpoint holds {shown(name)}, part of an adapter: merge the adapter into the model "
                "(peft's merge_and_unload) and save that"
            )
        if _CLASSIFIER.search(bare):
            return (
                f"the checkpoint holds {shown(name)}, the head of a classifier, which makes no text: give "
                "the checkpoint of the language model"
            )
        if _MAMBA_2.search(bare):
            return (
                f"the checkpoint holds {shown(name)}, which Mamba-2 layers have and Mamba-1 layers have not: give a "
                "checkpoint of a Mamba-1 model"
            )
        if any(wrapper in name for wrapper in _WRAPPERS):
            return (
                f"the checkpoint holds {shown(name)}, whose name a wrapper of part of the model has changed: save the "
                "state_dict of the model without its wrappers"
            )
    if found.missing == [LM_HEAD] and not found.unknown:
        return (
            f"the checkpoint lacks {LM_HEAD}, which its config.json asks for, and has all else: give the checkpoint of "
            "the model with its language-model head, or set tie_word_embeddings to true if the embedding is that head"
        )
    return None


def _other_sizes(found: Differences, source: TensorSource) -> str:
    if found.missing:
        if not found.shapes:
            return (
                f"none of the {len(source.names())} tensors of the checkpoint, such as {shown(source.names()[0])}, has "
                "a name of this family: give a checkpoint of the model type that its config.json names"
            )
        return (
            f"the checkpoint lacks {_first(found.missing)}, which its config.json asks for: {_USE_ITS_CONFIG}"
        )
    if found.unknown:
        return (
            f"the checkpoint holds {_first(found.unknown)}, which its config.json has no place for: "
            f"{_USE_ITS_CONFIG}"
        )
    name = found.misshapen[0]
    return (
        f"{shown(name)} has shape {list(source.shape(name))}, config.json asks for {list(found.shapes[name])}: "
        f"{_USE_ITS_CONFIG}"
    )


def refuse_other_depth(config: MambaConfig, source: TensorSource) -> None:
    """Refuse a number of layers that ``source`` does not hold, by names alone.

    Asked before a model is built, which takes work in proportion to that number.

    Raises:
        CheckpointError: ``config`` asks for more layers than ``source`` has tensors of.
    """
    our_name = get_family(config.model_type).our_name
    held = {match[1] for name in source.names() if (match := _LAYER.search(our_name(name)))}
    if held and config.num_hidden_layers > len(held):
        raise CheckpointError(
            f"config.json says num_hidden_layers {config.num_hidden_layers}, the checkpoint holds {len(held)} "
            f"layers: {_USE_ITS_CONFIG}"
        )


def _first(names: Sequence[str]) -> str:
    return shown(names[0]) if len(names) == 1 else f"{shown(names[0])} and {len(names) - 1} more tensors"


def _dtype(source: TensorSource, name: str) -> str:
    try:
        return _short(source.dtype(name))
    except ValueError:  # one that torch does not have
        return shown(source.dtype_name(name))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
