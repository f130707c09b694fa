"""config.json of a checkpoint folder, read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from tp_mamba.checkpoint.files import CONFIG, GGUF_PATTERN, GGUF_REFUSED
from tp_mamba.checkpoint.json_file import read_json_object
from tp_mamba.errors import ConfigError
from tp_mamba.models.config import MambaConfig
from tp_mamba.models.registry import Family, family_of
from tp_mamba.quoting import shown, shown_path

Config = TypeVar("Config", bound=MambaConfig)

_REMEDY: Final = "fetch or write it again"


def read_config(folder: Path, kind: type[Config]) -> Config:
    """The model that ``folder``'s config.json describes, as a ``kind``.

    Raises:
        ConfigError: there is none, it is not a JSON object, or it is not of a Mamba-1 model; the file is named.
    """
    fields = _read_fields(folder)
    with _named(folder):
        return kind.from_dict(fields)


def read_family(folder: Path) -> Family:
    """The family of the model that ``folder``'s config.json describes.

    Raises:
        ConfigError: as :func:`read_config`, but for what only the sizes of a model would show.
    """
    fields = _read_fields(folder)
    with _named(folder):
        return family_of(fields)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Put the name of the file in front of what is wrong with its fields."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{shown_path(folder / CONFIG)}: {error}") from None


def _read_fields(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        fields = read_json_object(path, remedy=_REMEDY, error=ConfigError)
    except FileNotFoundError:
        if gguf := min(folder.glob(GGUF_PATTERN), default=None):  # such a file comes without a config.json
            raise ConfigError(f"{shown_path(folder)} holds {shown(gguf.name)}, {GGUF_REFUSED}") from None
        raise ConfigError(f"{shown_path(folder)} has no {CONFIG}: give the folder of a checkpoint") from None
    try:
        # "\ud800" alone is JSON and no text: it could not be written back.
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{shown_path(path)} holds half of a surrogate pair, which is no text: {_REMEDY}"
        ) from None
    return fields
