"""One prompt on its way: what of it was taken in, what it has made, and whether it has ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Tokenizer

from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.sampler import UniformStream
from tp_mamba.text.detokenizer import Detokenizer
from tp_mamba.text.stop_strings import StopStrings

FinishReason = Literal["length", "eos", "stop"]
"""``max_new_tokens`` were made; the model's end of text; a stop id or string."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of one prompt."""

    index: int
    """Position of the prompt in the call."""
    token_id: int
    """The token, end-of-text and stop tokens included."""
    text: str
    """Text that has become certain with it: often that of this token, none while a character is unfinished or
    a stop string may be coming, more when the wait is over. Always empty without a tokenizer."""
    finish_reason: FinishReason | None
    """Why the sequence ended with this token; None while it goes on."""


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """A prompt and what was generated for it."""

    index: int
    prompt: Sequence[int]
    params: SamplingParams
    eos_ids: Collection[int]
    """End-of-text ids that end it."""
    detokenizer: Detokenizer | None
    slot: int = -1
    """Its place in the state cache; set when it enters the batch."""
    taken: int = 0
    """Prompt tokens whose effect is in the slot's state."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens generated so far. The last one is not in the state yet."""
    uniforms: UniformStream = field(init=False)
    stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self.uniforms = UniformStream(self.params.seed, self.index)
        self.stops = StopStrings(self.params.stop)

    @classmethod
    def new(
        cls,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_ids: Collection[int],
        tokenizer: Tokenizer | None,
        special_ids: frozenset[int],
    ) -> ActiveSequence:
        """A sequence about to begin; without a tokenizer it makes ids only."""
        detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt, special_ids)
        return cls(index, prompt, params, eos_ids, detokenizer)

    @property
    def remaining(self) -> int:
        """Prompt tokens still to be taken in; a sequence with none decodes."""
        return len(self.prompt) - self.taken

    def accept(self, token: int) -> TokenEvent:
        """Append ``token``; the event's ``finish_reason`` says whether the sequence ends with it."""
        self.token_ids.append(token)
        reason: FinishReason | None = None
        if token in self.eos_ids:
            reason = "eos"
        elif token in self.params.stop_token_ids:
            reason = "stop"
        silent = reason is not None  # a token that ends the text is no part of it
        if reason is None and len(self.token_ids) == self.params.max_new_tokens:
            reason = "length"
        text = ""
        if self.detokenizer is not None:
            text = "" if silent else self.detokenizer.push(token)
            if reason is not None:
                text += self.detokenizer.flush()
            text = self.stops.push(text)
            if self.stops.stopped:
                reason = "stop"
            elif reason is not None:
                text += self.stops.flush()
        return TokenEvent(self.index, token, text, reason)
