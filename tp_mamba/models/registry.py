"""The model families: what each one's config.json means, how it names its tensors, and what its blocks are.

A family is data and three or four functions. One from outside this package is registered the same way as those
inside, and its checkpoints then load, save, shard and merge::

    register_family(Family(model_type="my_mamba", parse=..., render=..., build_block=...))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tp_mamba.errors import ConfigError
from tp_mamba.quoting import quoted


def same_name(name: str) -> str:
    """A tensor that files call what this package calls it."""
    return name


def one_tensor(name: str) -> tuple[str, ...]:
    """A parameter that files keep as one tensor under its own name."""
    return (name,)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Family:
    """One family of models.

    Tensor names on this package's side are those of :class:`tp_mamba.models.base.CausalLM`:
    ``backbone.embeddings.weight``, ``backbone.layers.{i}.norm.weight``, ``backbone.layers.{i}.mixer.A_log``, ...
    """

    model_type: str
    """``model_type`` in its config.json, and of its :class:`~tp_mamba.models.config.MambaConfig`."""

    parse: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The content of its config.json -> keyword arguments of :class:`~tp_mamba.models.config.MambaConfig`.

    Raises ConfigError for what is missing, of a wrong type, or not Mamba-1; ``tp_mamba.models.fields`` helps.
    """

    render: Callable[[Any], dict[str, Any]]
    """The inverse: a :class:`~tp_mamba.models.config.MambaConfig` -> the content of its config.json."""

    build_block: Callable[..., nn.Module] | None = None
    """``(config, index, *, tp, dtype, device, prefix)`` -> block ``index``; None: only its mixers can be built.

    A block is called as :class:`~tp_mamba.models.block.MambaBlock` is, has the layer that keeps state as its attribute
    ``mixer``, and a method ``scale_residual_branch(layers)`` for initial values.
    """

    our_name: Callable[[str], str] = same_name
    """The name of a file's tensor -> the name of the parameter that it fills, alone or with others.

    Also takes the beginning of a name that ends in a dot, such as ``"backbone.layers.3.mixer."``. A name that the
    family does not know stays as it is.
    """

    file_names: Callable[[str], tuple[str, ...]] = one_tensor
    """The name of a parameter -> the names that its family's files keep it under.

    Several are joined, in this order, along the dimension that the parameter is cut along, one piece of the
    parameter (:attr:`tp_mamba.parallel.sharding.Shard.pieces`) a name.
    """

    recognises: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a config.json is this family's; by default that ``model_type`` is equal."""


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make ``family`` known to :class:`~tp_mamba.models.config.MambaConfig` and to every loader and saver.

    Raises:
        ValueError: there is a family of that ``model_type`` already.
    """
    if family.model_type in _FAMILIES:
        raise ValueError(
            f"there is a family {family.model_type!r} already: choose another model_type, or remove the older one "
            "with unregister_family()"
        )
    _FAMILIES[family.model_type] = family


def unregister_family(model_type: str) -> None:
    """Forget a family.

    Raises:
        ValueError: there is none of that ``model_type``.
    """
    get_family(model_type)
    del _FAMILIES[model_type]


def get_family(model_type: str) -> Family:
    """The family registered under ``model_type``.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ConfigError(
            f"model_type is {quoted(model_type)}, supported are {', '.join(_FAMILIES)}: give a model that keeps to "
            "this, or correct its config.json"
        )
    return _FAMILIES[model_type]


def families() -> tuple[Family, ...]:
    """Every family that is registered, in the order of registration."""
    return tuple(_FAMILIES.values())


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family whose config.json has the content ``fields``.

    Raises:
        ConfigError: no family recognises it.
    """
    model_type = fields.get("model_type")
    for family in families():
        recognises = family.recognises
        if model_type == family.model_type if recognises is None else recognises(fields):
            return family
    if model_type is None:
        raise ConfigError(
            "there is neither model_type nor d_model, so this is no model's: give the config.json of a state-spaces "
            "Mamba, Mamba -hf, FalconMamba or Jamba checkpoint"
        )
    raise ConfigError(
        f"model_type {quoted(model_type)} is not a Mamba-1 model: give a checkpoint of type "
        f"{', '.join(_FAMILIES)} (of jamba, its mixer)"
    )
