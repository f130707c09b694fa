"""Text from prompts, all at once or token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.params import SamplingParams, integer
from tp_mamba.engine.request import ActiveSequence, FinishReason, TokenEvent
from tp_mamba.text.detokenizer import special_token_ids
from tp_mamba.text.tokenizer import end_of_ids


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What one prompt became."""

    token_ids: list[int]
    """New tokens, the one that ended the sequence included."""
    text: str | None
    """Their text, up to an end-of-text token, stop token or stop string; None without a tokenizer."""
    finish_reason: FinishReason


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    max_batch_size: int | None = None,
    max_prefill_tokens: int = 8192,
) -> list[GenerationResult]:
    """Run :func:`stream` to its end and collect one result a prompt, in their order.

    Raises:
        ValueError, RuntimeError: as :func:`stream`.
    """
    token_ids: list[list[int]] = [[] for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    reasons: dict[int, FinishReason] = {}
    for event in stream(
        model,
        prompts,
        params,
        tokenizer,
        max_batch_size=max_batch_size,
        max_prefill_tokens=max_prefill_tokens,
    ):
        token_ids[event.index].append(event.token_id)
        texts[event.index].append(event.text)
        if event.finish_reason is not None:
            reasons[event.index] = event.finish_reason
    return [
        GenerationResult(ids, None if tokenizer is None else "".join(pieces), reasons[index])
        for index, (ids, pieces) in enumerate(zip(token_ids, texts, strict=True))
    ]


def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    max_batch_size: int | None = None,
    max_prefill_tokens: int = 8192,
) -> Iterator[TokenEvent]:
    """Generate for prompts of any lengths, giving out every token as it is made.

    Prompts are packed, not padded. A prompt's tokens do not depend on the prompts beside it (greedy, and
    sampled too, since its random numbers are its own), nor on the number of ranks, as far as the model's
    logits do not. Every rank calls this with the same arguments and gets the same events.

    The state cache is made here and its slots are given back at the end, at an error, and when the iterator
    is closed or dropped before its end.

    Args:
        model: see :class:`tp_mamba.model.MambaForCausalLM`.
        prompts: token ids of each prompt, none empty.
        params: how to choose tokens and when to stop; by default greedy, 128 tokens.
        tokenizer: turns tokens into text; without one events carry ids only. Ids above all of its own, which
            pad the vocabulary of many files, are never made.
        max_batch_size: sequences, and so state slots, at a time; the others wait. All at once by default.
        max_prefill_tokens: prompt tokens of one forward pass; longer prompts are cut. Activations take memory
            in proportion to this, not to the prompts' lengths.

    Returns:
        An iterator of :class:`TokenEvent`; the tokens of one prompt come in order, those of different prompts
        interleaved. Everything below but RuntimeError is raised by the call itself, before any work.

    Raises:
        ValueError: no prompts, an empty prompt, ids that are no integers or outside the vocabulary, stop
            strings without a tokenizer, a tokenizer without tokens, or a limit that is no integer or below 1.
        RuntimeError: logits that are not finite.
    """
    params = params or SamplingParams()
    prompts = [_checked_prompt(i, prompt, model.config.vocab_size) for i, prompt in enumerate(prompts)]
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one")
    _check_ids(f"stop_token_ids {params.stop_token_ids}", params.stop_token_ids, model.config.vocab_size)
    if params.stop and tokenizer is None:
        raise ValueError(
            f"stop strings {params.stop} were given without a tokenizer: pass one, or use stop_token_ids"
        )
    for name, limit in (("max_batch_size", max_batch_size), ("max_prefill_tokens", max_prefill_tokens)):
        if limit is not None and integer(name, limit) < 1:
            raise ValueError(f"{name}={limit} lets nothing run: it is at least 1")
    slots = min(len(prompts), int(max_batch_size or len(prompts)))
    usable = model.config.usable_vocab_size or model.config.vocab_size
    if tokenizer is not None:
        usable = min(usable, end_of_ids(tokenizer))
    return _events(model, prompts, params, tokenizer, slots, int(max_prefill_tokens), usable)


def _events(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    slots: int,
    max_prefill_tokens: int,
    usable: int,
) -> Iterator[TokenEvent]:
    """The generator behind :func:`stream`, whose ``finally`` runs however the consumer leaves it."""
    eos_ids = frozenset() if params.ignore_eos else frozenset(model.config.eos_token_ids)
    special_ids = frozenset() if tokenizer is None else special_token_ids(tokenizer)
    sequences = [
        ActiveSequence.new(i, prompt, params, eos_ids, tokenizer, special_ids)
        for i, prompt in enumerate(prompts)
    ]
    engine = Engine(
        model, sequences, params, slots=slots, max_prefill_tokens=max_prefill_tokens, usable=usable
    )
    try:
        while engine.busy:
            yield from engine.step()
    finally:
        engine.close()


def _checked_prompt(index: int, prompt: Sequence[int], vocab_size: int) -> list[int]:
    if isinstance(prompt, (str, bytes, int)):
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
                "tokenizer that "
                "belongs to this checkpoint"
            )
