"""Between a task's texts and a model's token ids, as lm_eval's own ``hf`` model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from tp_mamba.checkpoint.companions import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, read_companions
from tp_mamba.checkpoint.location import fetch
from tp_mamba.engine.params import SamplingParams

DEFAULT_MAX_LENGTH = 2048
"""Tokens of a window, where neither the caller nor the tokenizer says: lm_eval's number."""

_UNSET = 10**12
"""What a tokenizer's ``model_max_length`` is above where it says nothing."""

_FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Texts:
    """Encodes and decodes for one checkpoint.

    Attributes:
        name: where the tokenizer is from.
        end_id: the end-of-text token.
        prefix_id: stands where there is nothing before a text.
        max_length: tokens of a window that the tokenizer states, else 2048.
    """

    def __init__(self, tokenizer: Tokenizer, place: str, eos_token_ids: Sequence[int]) -> None:
        """For ``tokenizer``, which was read from ``place``; where the files there name no end of text, that is the
        model's.

        Raises:
            ValueError: a file is damaged, or neither names an end of text.
        """
        self.name, self._tokenizer = place, tokenizer
        folder = fetch(
            place, (), optional=(TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP), remedy="name another folder"
        )
        companions = read_companions(folder)
        special = companions.special_tokens
        end = self._id(special.get("eos_token"))
        end = eos_token_ids[0] if end is None and eos_token_ids else end
        if end is None:
            raise ValueError(
                f"{place} names no end-of-text token, which a score needs: add eos_token to {TOKENIZER_CONFIG}"
            )
        self.end_id: int = end
        begin = self._id(special.get("bos_token"))
        self.prefix_id: int = end if begin is None else begin
        stated: Any = companions.tokenizer.get("model_max_length")
        fits = isinstance(stated, (int, float)) and 0 < stated < _UNSET
        self.max_length: int = int(stated) if fits else DEFAULT_MAX_LENGTH

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of ``text``; what the tokenizer puts around a text is left out where it is there already."""
        if add_special_tokens is None:
            begins = self.decode([self.prefix_id], skip_special_tokens=False)
            add_special_tokens = not (begins and text.startswith(begins))
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Their text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def sampling_of(options: dict[str, Any], until: Sequence[str]) -> SamplingParams:
    """The parameters for a task's ``generation_kwargs``, normalised by lm_eval.

    Raises:
        ValueError: an option that means nothing here.
    """
    options = dict(options)
    most, draws = options.pop("max_gen_toks"), options.pop("do_sample", False)
    given = {name: options.pop(name) for name in _FILTERS if options.get(name) is not None}
    options = {name: value for name, value in options.items() if value is not None}
    if options:
        raise ValueError(
            f"generation_kwargs holds {', '.join(options)}, which means nothing here: there are until, do_sample, "
            f"max_gen_toks, {', '.join(_FILTERS)}"
        )
    if not draws:
        given["temperature"] = 0.0
    return SamplingParams(max_new_tokens=most, stop=tuple(each for each in until if each), **given)
