"""Conversations as prompts: the chat template of a checkpoint, rendered as transformers renders it.

A template is a program in Jinja that comes with the checkpoint. It runs in Jinja's sandbox: it sees the messages and
the names of the special tokens, and cannot reach Python, files or the network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tp_mamba.checkpoint.companions import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_JSON,
    DEFAULT_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    read_companions,
)
from tp_mamba.checkpoint.location import fetch
from tp_mamba.parallel.group import TensorParallel, checked
from tp_mamba.quoting import shown, shown_path

_REMEDY = "leave the chat out and give the prompt as plain text"


class _GenerationTag(Extension):
    """``{% generation %}`` marks, for training, what the model says; rendered, it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders a conversation into the text that a model was trained to continue."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        where: str = "the chat template",
    ) -> None:
        """Compile ``source``.

        Args:
            source: the template, in Jinja.
            special_tokens: ``bos_token``, ``eos_token`` and so on to their text, which templates refer to.
            where: where it comes from, for messages.

        Raises:
            ValueError: ``source`` is not a template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens, self._where = dict(special_tokens or {}), where
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(
                f"{where} is not a Jinja template that can be read ({shown(error)}): {_REMEDY}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of ``messages``. It has its special tokens in it: encode it without adding any.

        Args:
            messages: the turns of the conversation, each with ``role`` (``"system"``, ``"user"``, ``"assistant"``)
                and ``content``.
            add_generation_prompt: end with what begins the model's own turn.
            variables: whatever else the template knows, such as ``tools``.

        Raises:
            ValueError: no messages, a message without a role, or one that the template refuses or fails on.
        """
        if not messages or isinstance(messages, (str, bytes, Mapping)):
            raise ValueError(f"got {messages!r} for messages: give a list of them, as in {_EXAMPLE}")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(
                    f"message {number} is {message!r}, which has no role: write it as in {_EXAMPLE}"
                )
        given = {**self._special_tokens, "tools": None, "documents": None, **variables}
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **given
            )
        except Exception as error:  # a template is a program, and fails as programs do
            raise ValueError(
                f"{self._where} does not take these messages ({shown(error).rstrip('.')}): change them, or {_REMEDY}"
            ) from error


_EXAMPLE = '[{"role": "user", "content": "Hello"}]'


def load_chat_template(
    folder_or_name: str | os.PathLike[str], tp: TensorParallel | None = None
) -> ChatTemplate:
    """The chat template of a checkpoint folder, or of a model on the Hugging Face hub.

    It is, as in transformers, the one in chat_template.jinja, else in chat_template.json, else in
    tokenizer_config.json; of several the one named ``default``.

    Args:
        folder_or_name: where the tokenizer's files are.
        tp: ranks that all call this; if it fails on one, it fails on every one. None for this process alone.

    Raises:
        ValueError: there is no template, a file is damaged, or the name is neither a folder nor a model that the hub
            gives out.
        RankFailedError: it failed on another rank of ``tp``.
    """
    with checked(tp).agreed() if tp is not None else nullcontext():
        files = (CHAT_TEMPLATE, CHAT_TEMPLATE_JSON, TOKENIZER_CONFIG)
        folder = fetch(folder_or_name, files, optional=(SPECIAL_TOKENS_MAP,), remedy=_REMEDY)
        companions = read_companions(folder)
        if companions.chat_template is None:
            others = sorted(companions.chat_templates)
            named = f" named {DEFAULT_TEMPLATE!r} (there is {shown(', '.join(others))})" if others else ""
            raise ValueError(f"{shown_path(folder_or_name)} has no chat template{named}: {_REMEDY}")
        return ChatTemplate(
            companions.chat_template,
            companions.special_tokens,
            where=f"the chat template of {shown_path(folder_or_name)}",
        )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter of this name escapes HTML, which a prompt is not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
