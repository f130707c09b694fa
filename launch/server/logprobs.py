"""Logarithms of probabilities, in the two shapes that OpenAI's answers have for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders

from tp_mamba.engine.token_logprob import TokenLogprob

Place = tuple[int, TokenLogprob | None]
"""A token, and how likely it was; None for the first of a prompt, before which there is nothing."""


@dataclass(slots=True)
class TokenTexts:
    """What single tokens are, outside any text."""

    tokenizer: Tokenizer
    _texts: dict[int, str] = field(default_factory=dict)

    def text(self, token: int) -> str:
        """Its text; a part of a character is U+FFFD."""
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return self._texts[token]

    def bytes(self, token: int) -> list[int]:
        """Its bytes, of a part of a character too where the vocabulary is one of bytes."""
        name = self.tokenizer.id_to_token(token)
        if name is not None and isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            found = [_BYTES.get(character) for character in name]
            if None not in found:
                return [byte for byte in found if byte is not None]
        return list(self.text(token).encode())


def of_completion(texts: TokenTexts, places: Sequence[Place], offset: int) -> tuple[dict[str, Any], int]:
    """``logprobs`` of a text that begins ``offset`` characters into its choice's; and where the next one begins.

    Lists of the likeliest hold the chosen token as well, with the very number that stands for it alone. They are
    objects by text: of tokens that look alike the likeliest is told.
    """
    tokens, values, tops, offsets = [], [], [], []
    for token, scored in places:
        text = texts.text(token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if scored is None else scored.logprob)
        tops.append(None if scored is None else _by_text(texts, scored))
    body = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
    return body, offset


def _by_text(texts: TokenTexts, scored: TokenLogprob) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in (*scored.top, (scored.token_id, scored.logprob)):
        text = texts.text(token)
        found[text] = max(logprob, found.get(text, logprob))
    return found


def of_chat(texts: TokenTexts, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a message."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": logprob, "bytes": texts.bytes(token)}

    content = [
        entry(scored.token_id, scored.logprob) | {"top_logprobs": [entry(*pair) for pair in scored.top]}
        for scored in scores
    ]
    return {"content": content, "refusal": None}


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes: themselves where they can be seen, else from 256."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
