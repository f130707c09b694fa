"""From the names in a checkpoint's files to the names of a model's tensors, and back.

The family says what its files call a tensor (:class:`tp_mamba.models.registry.Family`); what is added in front of
every name by whatever wrapped the model when it was saved is found here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from tp_mamba.checkpoint.sources.base import TensorSource
from tp_mamba.models.registry import Family
from tp_mamba.parallel.sharding import Shard, ShardedTensor


@dataclass(frozen=True, slots=True)
class Naming:
    """How the names of one source are read."""

    family: Family
    prefix: str = ""
    """What stands in front of every name, such as ``"module."``."""
    ours: bool = False
    """Whether the names are this package's own, as in the files of ``tp-mamba shard``."""

    def our_name(self, stored: str) -> str:
        """The name of the model's tensor that the source's ``stored`` fills, alone or with others."""
        return stored if self.ours else self.family.our_name(stored.removeprefix(self.prefix))

    def file_name(self, stored: str) -> str:
        """``stored`` without what was put in front."""
        return stored.removeprefix(self.prefix)


def naming_of(source: TensorSource, family: Family, wanted: Collection[str]) -> Naming:
    """How the names of ``source`` are to be read so that most of them are in ``wanted``, names of the model.

    A prefix counts only where every name has it: DistributedDataParallel's ``module.``, torch.compile's
    ``_orig_mod.``, peft's ``base_model.model.``, a Trainer's ``model.``.
    """
    if source.names_are_ours:
        return Naming(family, ours=True)
    names = source.names()
    namings = [Naming(family, prefix) for prefix in common_prefixes(names)]
    return max(namings, key=lambda naming: sum(naming.our_name(name) in wanted for name in names))


def common_prefixes(names: Sequence[str]) -> Iterator[str]:
    """What all of ``names`` begin with, up to and with a dot, beginning with nothing at all; shortest first."""
    yield ""
    if not names:
        return
    first, last = min(names), max(names)  # what these two share, all share
    for i, character in enumerate(first[:-1]):
        if not last.startswith(first[: i + 1]):
            return
        if character == "." and i + 1 < len(last):
            yield first[: i + 1]


def filed(tensor: ShardedTensor, family: Family) -> Shard:
    """How a full checkpoint of ``family`` keeps ``tensor``: its shard, with ``sources`` the names in the files.

    Raises:
        ValueError: the family keeps it in several tensors that are neither its pieces nor of one size.
    """
    shard = tensor.shard
    names = tuple(file for name in tensor.names for file in family.file_names(name))
    join = shard.join if len(tensor.names) > 1 or shard.dim is None else shard.dim
    return replace(shard, sources=names, join=join)
