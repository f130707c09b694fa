"""Text from prompts, all at once or token by token: loops over an engine."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from tokenizers import Tokenizer

from tp_mamba.engine.collected import Collected
from tp_mamba.engine.engine import Engine
from tp_mamba.engine.graphs import CaptureReport
from tp_mamba.engine.intake import Prompts, params_of, rows_of
from tp_mamba.engine.memory import MEMORY_FRACTION
from tp_mamba.engine.model import Model
from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import FinishReason, TokenEvent
from tp_mamba.engine.token_logprob import TokenLogprob
from tp_mamba.options import CacheConfig
from tp_mamba.parallel.turns import hold


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What one prompt became."""

    token_ids: list[int]
    """New tokens, the one that ended the sequence included."""
    text: str | None
    """Their text, up to an end-of-text token, stop token or stop string; None without a tokenizer."""
    finish_reason: FinishReason
    error: str | None = None
    """With ``finish_reason="error"``: what went wrong; tokens and text are those made before."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of ``token_ids``, where ``logprobs`` asked for them."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """As in :class:`TokenEvent`, where ``prompt_logprobs`` asked for them."""


class TokenStream(Iterator[TokenEvent]):
    """The events of one call of :func:`stream`; it gives its state back at its end, on :meth:`close`, or dropped."""

    def __init__(self, engine: Engine) -> None:
        """Follow ``engine``, which has started and has its requests."""
        self._engine, self._events = engine, deque[TokenEvent]()

    @property
    def captured(self) -> CaptureReport:
        """How many steps were captured so far, and in what time."""
        return self._engine.captured

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens so far that were not computed, since a kept state stood for them."""
        return self._engine.reused_tokens

    @property
    def max_batch_size(self) -> int:
        """Sequences that run at a time."""
        assert self._engine.max_batch_size is not None  # it has started
        return self._engine.max_batch_size

    def __next__(self) -> TokenEvent:
        try:
            while not self._events and self._engine.has_work:
                self._events.extend(self._engine.step())
        except BaseException:
            self.close()
            raise
        if not self._events:
            self.close()
            raise StopIteration
        return self._events.popleft()

    def close(self) -> None:
        """Stop here, whether or not every sequence has ended."""
        self._engine.close()
        self._events.clear()


def generate(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    max_batch_size: int | None = None,
    max_prefill_tokens: int = 8192,
    memory_fraction: float = MEMORY_FRACTION,
    eager: bool = False,
    cache_config: CacheConfig | None = None,
    overlap: bool | None = None,
    **sampling: Any,
) -> list[GenerationResult]:
    """Run :func:`stream` to its end and collect one result per prompt, in their order.

    A sequence that fails has a result too, with ``finish_reason="error"`` and its ``error``.

    Raises:
        ValueError, RankFailedError: as :func:`stream`.
    """
    events = stream(
        model,
        prompts,
        params,
        tokenizer,
        attention_mask=attention_mask,
        max_batch_size=max_batch_size,
        max_prefill_tokens=max_prefill_tokens,
        memory_fraction=memory_fraction,
        eager=eager,
        cache_config=cache_config,
        overlap=overlap,
        **sampling,
    )
    found: dict[int, Collected] = {}
    for event in events:
        found.setdefault(event.index, Collected()).take(event)
    return [
        GenerationResult(
            each.token_ids,
            None if tokenizer is None else each.text,
            each.finish_reason,  # type: ignore[arg-type]  # the last event has told it
            each.error,
            each.logprobs,
            each.prompt_logprobs,
        )
        for _, each in sorted(found.items())
    ]


def stream(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    max_batch_size: int | None = None,
    max_prefill_tokens: int = 8192,
    memory_fraction: float = MEMORY_FRACTION,
    eager: bool = False,
    cache_config: CacheConfig | None = None,
    overlap: bool | None = None,
    **sampling: Any,
) -> TokenStream:
    """Generate for prompts of any lengths, giving out every token as it is made.

    Prompts are packed, not padded. A prompt's tokens do not depend on the prompts beside it (greedy, and
    sampled too, since its random numbers are its own), nor on the number of ranks, as far as the model's
    logits do not. Every rank calls this with the same arguments, which are compared, and gets the same events.

    State for all sequences that run at a time is allocated here and given back at the end, at an error, and when
    the iterator is closed or dropped before its end.

    Args:
        model: see :class:`tp_mamba.engine.model.Model`; a :class:`tp_mamba.MambaForCausalLM`, for example.
        prompts: token ids of each prompt, none empty: lists of any lengths, or a tensor ``[B, L]`` or ``[L]``.
        params: how to choose tokens and when to stop, for all prompts or one for each; by default greedy, 128
            tokens. With ``n`` samples of a prompt, all come after one another: prompt 1 has the indices behind those
            of prompt 0.
        tokenizer: turns tokens into text; without one events carry ids only. Ids above all of its own, which
            pad the vocabulary of many files, are never made.
        attention_mask: ``[B, L]`` beside a tensor of prompts, nonzero where its ids are not padding.
        max_batch_size: sequences, and so state slots, at a time; the others wait. By default all at once. Where memory
            has room for fewer it is lowered, with a :class:`ClampedWarning` if it was given; the iterator's
            ``max_batch_size`` says how many run.
        max_prefill_tokens: prompt tokens of one forward pass; longer prompts are cut. Activations take memory
            in proportion to this, not to the prompts' lengths. Lowered likewise.
        memory_fraction: part of the memory that is free now, on the rank with the least, which activations and states
            may take.
        eager: launch every kernel from the host instead of capturing steps in CUDA graphs; always so on a CPU.
        cache_config: whether prompts begin with the states of prompts before them; by default as the model was made.
        overlap: launch a step before the tokens of the one before are known to the host; the events of a sequence are
            the same. By default on a GPU.
        sampling: fields of :class:`SamplingParams` by name, in place of those of ``params``, as in
            ``max_new_tokens=20``.

    Returns:
        An iterator of :class:`TokenEvent`; the tokens of one prompt come in order, those of different prompts
        interleaved. A sequence whose logits are not finite ends with an event whose ``finish_reason`` is "error",
        the others go on.

    Raises:
        ValueError: by the call itself, before any work: no prompts, an empty prompt, ids that are no integers or
            outside the vocabulary, a tensor that may be padded without a mask, stop strings without a tokenizer, a
            tokenizer without tokens, an unknown or wrong parameter, a limit that is no integer or below 1, arguments
            that differ between the ranks, or another thread that generates over the same ranks.
        RankFailedError: another rank refused its arguments or could not allocate its state.
    """
    tp, config = model.tp, model.config
    let_go = hold(tp, "generating")
    try:
        with tp.agreed():
            padding = config.eos_token_ids if config.pad_token_id is None else (config.pad_token_id,)
            rows = rows_of(prompts, attention_mask, padding)
            each_params = params_of(params, sampling, len(rows))
            engine = Engine(
                model,
                tokenizer,
                max_batch_size=max_batch_size,
                max_prefill_tokens=max_prefill_tokens,
                memory_fraction=memory_fraction,
                eager=eager,
                cache_config=cache_config,
                overlap=overlap,
            )
            for index, (prompt, its_params) in enumerate(zip(rows, each_params, strict=True)):
                engine.add_request(prompt, its_params, position=index)
        if tp.size > 1:
            tp.same_everywhere(
                **{
                    "the model's configuration": config,
                    "the model's dtype": getattr(model, "dtype", None),
                    "the tokenizer": _digest(tokenizer),
                    "the number of prompts": len(rows),
                    "max_batch_size": max_batch_size,
                    "max_prefill_tokens": max_prefill_tokens,
                    "memory_fraction": memory_fraction,
                    "eager": eager,
                    "cache_config": cache_config,
                    "overlap": overlap,
                    **_described(rows, each_params),
                }
            )
        engine.start(at_most=sum(each.n for each in each_params))
    finally:
        let_go()
    return TokenStream(engine)


def _digest(tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _described(rows: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> dict[str, Any]:
    """Every parameter, one value if all prompts have the same, and every prompt, under names that an error can use."""
    named: dict[str, Any] = {}
    for field in fields(SamplingParams):
        values = [getattr(each, field.name) for each in params]
        named[field.name] = values[0] if values.count(values[0]) == len(values) else values
    return named | {f"prompt {index}": list(map(int, row)) for index, row in enumerate(rows)}
