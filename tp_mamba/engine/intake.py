"""From what a caller passes to requests: every check of prompts and parameters, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from tp_mamba.engine.model import ModelConfig
from tp_mamba.engine.params import SamplingParams, integer, with_options
from tp_mamba.engine.request import Request
from tp_mamba.text.detokenizer import Detokenizer, special_token_ids
from tp_mamba.text.tokenizer import end_of_ids

Prompts = Sequence[Sequence[int]] | torch.Tensor | np.ndarray
"""Token ids of each prompt: a list of any lengths, rows ``[B, L]`` of equal lengths, or one prompt ``[L]``."""


class RequestBuilder:
    """Makes the requests for one model and tokenizer.

    Attributes:
        usable: ids below this may be made: neither the padding of the model's vocabulary nor ids above all of the
            tokenizer's.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """Look the tokenizer over, once for all requests.

        Raises:
            ValueError: ``tokenizer`` has no tokens.
        """
        self._config, self._tokenizer = config, tokenizer
        self.usable = config.usable_vocab_size or config.vocab_size
        self._special_ids: frozenset[int] = frozenset()
        if tokenizer is not None:
            self.usable = min(self.usable, end_of_ids(tokenizer))
            self._special_ids = special_token_ids(tokenizer)

    def build(
        self, index: int, prompt: Sequence[int], params: SamplingParams, position: int, sample: int = 0
    ) -> Request:
        """Request ``index``, about to begin; ``sample`` of those of its prompt.

        Raises:
            ValueError: an empty prompt, ids that are no integers or outside the vocabulary, or stop strings
                without a tokenizer.
        """
        ids = checked_prompt(index, prompt, self._config.vocab_size)
        _check_ids(f"stop_token_ids {params.stop_token_ids}", params.stop_token_ids, self._config.vocab_size)
        biased = tuple(token for token, _ in params.bias_pairs)
        _check_ids(f"logit_bias of ids {biased}", biased, self._config.vocab_size)
        if params.stop and self._tokenizer is None:
            raise ValueError(
                f"stop strings {params.stop} were given without a tokenizer: pass one, or use stop_token_ids"
            )
        return Request(
            index,
            ids,
            params,
            position,
            sample,
            eos_ids=frozenset() if params.ignore_eos else frozenset(self._config.eos_token_ids),
            detokenizer=None
            if self._tokenizer is None
            else Detokenizer(self._tokenizer, ids, self._special_ids),
        )


def rows_of(prompts: Prompts, attention_mask: torch.Tensor | None, ends: Iterable[int]) -> list[Any]:
    """One sequence of ids for each prompt; the rows of a tensor lose what ``attention_mask`` says is padding.

    Args:
        prompts: see :data:`Prompts`.
        attention_mask: ``[B, L]``, nonzero where a tensor's ids belong to the prompt; None if all do.
        ends: ids that may be padding.

    Raises:
        ValueError: no prompts, a mask that does not fit, or a tensor without a mask in which some rows but not all
            begin or end with one of ``ends``, so that nobody can tell whether it is padding.
    """
    if not isinstance(prompts, (torch.Tensor, np.ndarray)):
        if attention_mask is not None:
            raise ValueError(
                "attention_mask was given with a list of prompts, which needs none: leave it out, or pass a tensor"
            )
        if not isinstance(prompts, Iterable):
            raise ValueError(
                f"prompts is {prompts!r}: give a list of prompts, or a tensor of ids [B, L] or [L]"
            )
        rows = list(prompts)
        if not rows:
            raise ValueError("the list of prompts is empty: give at least one")
        return rows
    if prompts.ndim not in (1, 2) or 0 in prompts.shape:
        raise ValueError(
            f"got prompts of shape {list(prompts.shape)}: token ids are [B, L] or [L], with at least one token"
        )
    rows = (prompts if prompts.ndim == 2 else prompts[None]).tolist()
    if attention_mask is not None:
        shape = list(getattr(attention_mask, "shape", ["no tensor"]))
        if shape != list(prompts.shape):
            raise ValueError(
                f"attention_mask is {shape} beside prompts of shape {list(prompts.shape)}: they have one shape"
            )
        masks = (attention_mask if prompts.ndim == 2 else attention_mask[None]).tolist()
        return [
            [i for i, kept in zip(row, mask, strict=True) if kept]
            for row, mask in zip(rows, masks, strict=True)
        ]
    for where, edge in (("begin", 0), ("end", -1)):
        for token in ends:
            padded = [row[edge] == token for row in rows]
            if any(padded) and not all(padded):
                raise ValueError(
                    f"some rows of prompts {where} with the id {token}, others do not, so it may be padding: pass "
                    "attention_mask, or a list of prompts of their own lengths"
                )
    return rows


def params_of(
    params: SamplingParams | Sequence[SamplingParams] | None, options: Mapping[str, Any], prompts: int
) -> list[SamplingParams]:
    """The parameters of each of ``prompts`` prompts, the fields of ``options`` set in all.

    Raises:
        ValueError: another number of ``params`` than of prompts, or what :func:`with_options` refuses.
    """
    if params is None or isinstance(params, SamplingParams) or not isinstance(params, Sequence):
        return [with_options(params, options)] * prompts
    if len(params) != prompts:
        raise ValueError(
            f"got {len(params)} SamplingParams for {prompts} prompts: give one for all, or one for each"
        )
    return [with_options(each, options) for each in params]


def checked_limit(name: str, limit: int) -> int:
    """``limit`` as an int of at least 1.

    Raises:
        ValueError: it is none.
    """
    if integer(name, limit) < 1:
        raise ValueError(f"{name}={limit} lets nothing run: it is at least 1")
    return int(limit)


def checked_prompt(index: int, prompt: Sequence[int], vocab_size: int) -> list[int]:
    """The ids of ``prompt`` as ints.

    Raises:
        ValueError: no ids, or ids that are no integers in ``0..vocab_size - 1``.
    """
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Iterable):
        raise ValueError(
            f"prompt {index} is {prompt!r}: a prompt is a sequence of token ids, as in "
            "tokenizer.encode(text).ids"
        )
    what = f"a token id of prompt {index}"
    ids = [integer(what, token) for token in prompt]
    if not ids:
        raise ValueError(f"prompt {index} is empty: the first token needs at least one before it")
    _check_ids(f"prompt {index}", ids, vocab_size)
    return ids


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{what} holds the id {token}, the vocabulary has ids 0 to {vocab_size - 1}: use the "
                "tokenizer that belongs to this checkpoint"
            )
