"""Text of a growing sequence of tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no character, or not yet one."""

_PROMPT_TAIL = 8
"""Tokens of the prompt that set the scene for the first one after it."""

_PATIENCE = 32
"""Tokens that may wait for a character to be completed. One of UTF-8 has four bytes, so that a longer wait
means bytes that never become text."""

_MAX_PARTIAL = 3
"""Bytes, and so at most marks, of a character of which at least one byte is still to come."""


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that have no place in a text, such as the end-of-text token."""
    return frozenset(id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special)


class Detokenizer:
    """Turns one sequence's tokens into text as they come, at a cost that does not grow with the text.

    A token's text depends on its neighbours: its bytes may be part of a character, and some decoders drop the
    space before the first word they see. Each piece is therefore what a token adds to the text of the few
    before it, beginning with the end of the prompt, and a character is given out only when all its bytes are
    there. The pieces together are what decoding prompt and tokens at once gives after the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], special_ids: frozenset[int]) -> None:
        """Start after ``prompt``; ``special_ids`` (see :func:`special_token_ids`) give no text."""
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        # The last tokens given out, and those still waiting. Only their text together is meaningful.
        self._context: list[int] = []
        self._pending = [token for token in prompt[-_PROMPT_TAIL:] if token not in special_ids]
        for token in reversed(prompt[-2 * _PROMPT_TAIL : -_PROMPT_TAIL]):
            # A tail that begins inside a character may spoil the bytes that follow: reach further back.
            if not self._decode().startswith(_UNFINISHED):
                break
            if token not in special_ids:
                self._pending.insert(0, token)
        text = self._decode()
        waiting = _unfinished_tail(text)
        self._given = len(text) - waiting  # characters of the text that were given out
        if not waiting:
            self._advance(waiting)

    def push(self, token: int) -> str:
        """Take one more token and return the text that it completes, which may be none."""
        if token in self._special_ids:
            return ""
        self._pending.append(token)
        text = self._decode()
        waiting = _unfinished_tail(text)
        if waiting and len(self._pending) <= _PATIENCE:
            return ""
        waiting = min(waiting, _MAX_PARTIAL)
        piece = text[self._given : len(text) - waiting]
        self._advance(waiting)
        return piece

    def flush(self) -> str:
        """The text still waiting, now that no more tokens follow: unfinished characters as U+FFFD."""
        return self._decode()[self._given :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=False)

    def _advance(self, waiting: int) -> None:
        """Make the pending tokens the context, all but the last ``waiting`` characters of it given out."""
        self._context, self._pending = self._pending, []
        self._given = len(self._decode()) - waiting


def _unfinished_tail(text: str) -> int:
    return len(text) - len(text.rstrip(_UNFINISHED))
