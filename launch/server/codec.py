"""Between the texts of requests and token ids."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from tp_mamba.checkpoint.companions import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_JSON,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    read_companions,
)
from tp_mamba.checkpoint.location import fetch
from tp_mamba.config import MambaConfig
from tp_mamba.engine.intake import checked_prompt
from tp_mamba.launch.server.errors import refused
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.quoting import shown
from tp_mamba.text.chat import ChatTemplate, load_chat_template
from tp_mamba.text.tokenizer import load_tokenizer

_LONG = 20_000
"""Characters from which a text is encoded on a thread of its own, so that the loop goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """The tokenizer of a checkpoint, and what its files say about it."""

    tokenizer: Tokenizer
    vocab_size: int
    """Ids are below it."""
    template: ChatTemplate | None = None
    template_source: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """``eos_token`` and so on to their texts."""

    async def encode(self, text: str, *, special: bool = True, what: str = "prompt") -> list[int]:
        """The ids of ``text``; with ``special`` the tokens that the tokenizer puts around a text too.

        Raises:
            ApiError: 400 for half a character, which JSON can say and no tokenizer reads.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise refused(f"{what} holds half a surrogate pair, which is no character: send whole ones", what)

        def ids() -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

        return await asyncio.to_thread(ids) if len(text) > _LONG else ids()

    async def prompt_ids(self, prompt: str | Sequence[Any], number: int, *, special: bool) -> list[int]:
        """The checked ids of prompt ``number`` of a request.

        Raises:
            ApiError: 400 for a prompt without tokens, or ids outside the vocabulary.
        """
        ids: Sequence[Any] = await self.encode(prompt, special=special) if isinstance(prompt, str) else prompt
        try:
            return checked_prompt(number, ids, self.vocab_size)
        except ValueError as error:
            raise refused(shown(error, 1000), "prompt") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    async def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], *, special: bool = False, **variables: Any
    ) -> list[int]:
        """The ids of a conversation.

        Raises:
            ApiError: 400 where the checkpoint has no chat template, or one that refuses the messages.
        """
        if self.template is None:
            raise refused(
                "this checkpoint has no chat template: give the prompt as plain text to /v1/completions",
                "messages",
            )
        try:
            text = self.template.render(messages, **variables)
        except (ValueError, TypeError) as error:
            raise refused(shown(error, 1000), "messages") from None
        return await self.encode(
            text, special=special, what="messages"
        )  # the template has written special ones


def load_codec(args: argparse.Namespace, tp: TensorParallel) -> Codec:
    """The codec of ``--tokenizer``, or of the checkpoint; every rank calls this.

    Raises:
        ValueError: there is no tokenizer, or a file beside it is damaged.
        RankFailedError: it failed on another rank.
    """
    place = args.tokenizer or args.checkpoint
    tokenizer = load_tokenizer(place, tp)
    with tp.agreed():
        beside = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE, CHAT_TEMPLATE_JSON)
        companions = read_companions(
            fetch(place, ("tokenizer.json",), optional=beside, remedy="pass --tokenizer")
        )
        config = MambaConfig.from_pretrained(args.checkpoint)
        special = dict(companions.special_tokens)
        if "eos_token" not in special and config.eos_token_ids:
            special["eos_token"] = tokenizer.decode([config.eos_token_ids[0]], skip_special_tokens=False)
    has_template = companions.chat_template is not None
    return Codec(
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        template=load_chat_template(place, tp) if has_template else None,
        template_source=companions.chat_template,
        special_tokens=special,
    )
