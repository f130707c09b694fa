"""The small files beside the weights, as data: ends of text, special and added tokens, the chat template.

They are copied from a checkpoint to one made from it (:data:`tp_mamba.checkpoint.files.COMPANIONS`), and read here.
Absent files are no error: every field says what it is then. A file that is there and damaged is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.json_file import read_json_object
from tp_mamba.quoting import quoted, shown, shown_path

GENERATION_CONFIG: Final = "generation_config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
SPECIAL_TOKENS_MAP: Final = "special_tokens_map.json"
ADDED_TOKENS: Final = "added_tokens.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
CHAT_TEMPLATE_JSON: Final = "chat_template.json"

DEFAULT_TEMPLATE: Final = "default"
"""Name of the template that is used where a checkpoint has several and none is asked for."""

_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_REMEDY: Final = "correct it, remove it, or fetch it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Companions:
    """What the companions of one checkpoint say."""

    eos_token_ids: tuple[int, ...] | None = None
    """Ids that end a text, from generation_config.json; None where it names none, so that config.json decides."""

    pad_token_id: int | None = None
    """Id of padding, from generation_config.json; None where it names none, so that config.json decides."""

    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json as it is; empty where there is none."""

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """``bos_token``, ``eos_token`` and so on to its text, from tokenizer_config.json or special_tokens_map.json."""

    added_tokens: Mapping[int, str] = field(default_factory=dict)
    """Id to text of the tokens added to the tokenizer's own, from tokenizer_config.json and added_tokens.json."""

    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """Name to Jinja source; a template without a name is called :data:`DEFAULT_TEMPLATE`."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default template; None where there is none."""
        return self.chat_templates.get(DEFAULT_TEMPLATE)


def read_companions(folder: str | Path) -> Companions:
    """What the companions in ``folder`` say.

    The chat template comes, as in transformers, from chat_template.jinja, else from chat_template.json, else from
    tokenizer_config.json.

    Raises:
        CheckpointError: a file cannot be read, is not JSON, or a field in it has the wrong type.
    """
    folder = Path(folder)
    generation, tokenizer = _object(folder, GENERATION_CONFIG), _object(folder, TOKENIZER_CONFIG)
    where = folder / GENERATION_CONFIG
    return Companions(
        eos_token_ids=_ids(where, "eos_token_id", generation.get("eos_token_id")),
        pad_token_id=_id(where, "pad_token_id", generation.get("pad_token_id")),
        tokenizer=tokenizer,
        special_tokens=_special_tokens(folder, tokenizer),
        added_tokens=_added_tokens(folder, tokenizer),
        chat_templates=_chat_templates(folder, tokenizer),
    )


def _object(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_json_object(folder / name, remedy=_REMEDY)
    except FileNotFoundError:
        return {}


def _wrong(path: Path, key: str, value: object, rule: str) -> CheckpointError:
    return CheckpointError(
        f"{shown_path(path)}: {shown(key)} is {quoted(value)}, it must be {rule}: {_REMEDY}"
    )


def _id(path: Path, key: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _wrong(path, key, value, "a token id, a whole number from 0")
    return value


def _ids(path: Path, key: str, value: object) -> tuple[int, ...] | None:
    if isinstance(value, list):
        found = tuple(_id(path, key, item) for item in value)
        return tuple(item for item in found if item is not None)
    one = _id(path, key, value)
    return None if one is None else (one,)


def _text(path: Path, key: str, value: object) -> str:
    """The text of a token, which is a string or an object with ``content``."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise _wrong(path, key, value, "a string, or an object with a string as content")
    return content


def _special_tokens(folder: Path, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, fields in (
        (SPECIAL_TOKENS_MAP, _object(folder, SPECIAL_TOKENS_MAP)),
        (TOKENIZER_CONFIG, tokenizer),
    ):
        for key in _SPECIAL:
            if fields.get(key) is not None:
                found[key] = _text(folder / name, key, fields[key])
    return found


def _added_tokens(folder: Path, tokenizer: Mapping[str, Any]) -> dict[int, str]:
    path = folder / ADDED_TOKENS
    found = {}
    for text, value in _object(folder, ADDED_TOKENS).items():
        if (token := _id(path, text, value)) is not None:
            found[token] = text
    path, key = folder / TOKENIZER_CONFIG, "added_tokens_decoder"
    decoder = tokenizer.get(key) or {}
    if not isinstance(decoder, dict):
        raise _wrong(path, key, decoder, "an object of tokens by id")
    for name, value in decoder.items():
        if not (name.isascii() and name.isdigit() and len(name) < 20):
            raise _wrong(path, key, name, "an object of tokens by id")
        found[int(name)] = _text(path, f"{key}[{name}]", value)
    return found


def _chat_templates(folder: Path, tokenizer: Mapping[str, Any]) -> dict[str, str]:
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            return {DEFAULT_TEMPLATE: path.read_text(encoding="utf-8")}
        except (OSError, UnicodeError) as error:
            raise CheckpointError(f"{shown_path(path)} cannot be read ({shown(error)}): {_REMEDY}") from error
    path = folder / CHAT_TEMPLATE_JSON
    if path.is_file():
        return _named_templates(path, _object(folder, CHAT_TEMPLATE_JSON).get("chat_template"))
    return _named_templates(folder / TOKENIZER_CONFIG, tokenizer.get("chat_template"))


def _named_templates(path: Path, value: object) -> dict[str, str]:
    """A template alone, a list of ``{"name": ..., "template": ...}``, or templates by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {str(item.get("name")): item.get("template") for item in value}
    if not isinstance(value, dict) or not all(isinstance(template, str) for template in value.values()):
        raise _wrong(path, "chat_template", value, "a template, or a list of templates with their names")
    return value
