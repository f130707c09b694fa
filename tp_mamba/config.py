"""The configuration of a model, with the way to it from a folder or a name on the Hugging Face hub."""

from __future__ import annotations

import os
from typing import Self

from tp_mamba.checkpoint.config import read_config
from tp_mamba.checkpoint.location import resolve
from tp_mamba.models import config


class MambaConfig(config.MambaConfig):
    __doc__ = config.MambaConfig.__doc__
    __slots__ = ()

    @classmethod
    def from_pretrained(cls, path_or_name: str | os.PathLike[str]) -> Self:
        """The model of a checkpoint folder or of a name on the Hugging Face hub (only config.json is fetched).

        Raises:
            CheckpointError: there is no such folder or name, or it has no config.json.
            ConfigError: as :meth:`from_dict`, with the file's path; also where the file is not a JSON object.
        """
        return read_config(resolve(path_or_name, config_only=True), cls)
