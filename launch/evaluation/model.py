"""The model class that lm_eval asks, registered there as ``tp_mamba``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch.evaluation.scoring import Scoring
from tp_mamba.launch.evaluation.texts import Texts, sampling_of
from tp_mamba.launch.ranks.start import make_tensor_parallel
from tp_mamba.model import MambaForCausalLM
from tp_mamba.text.tokenizer import load_tokenizer

MAX_GEN_TOKENS = 256
"""New tokens of a task that does not say how many; lm_eval's number."""


class ScoredModel(TemplateLM):
    """What lm_eval asks, answered by an engine that is already there."""

    def __init__(self, scoring: Scoring, texts: Texts, max_length: int | None = None) -> None:
        """Windows of longer texts have ``max_length`` tokens, by default what ``texts`` says."""
        super().__init__()
        self._scoring, self._texts = scoring, texts
        self.max_length = max_length or texts.max_length

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._texts.end_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self._texts.prefix_id

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a task that does not say how many."""
        return MAX_GEN_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm_eval's cache of requests."""
        return self._texts.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of ``string``."""
        return self._texts.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each request ``(key, context, continuation)``; contexts are cut on the left."""
        pairs = []
        for _key, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens: it has 1 to max_length={self.max_length}"
                )
            whole = (context + continuation)[-(self.max_length + 1) :]
            start = len(whole) - len(continuation)
            pairs.append((whole[:start], whole[start:]))
        found = self._scoring.loglikelihoods(pairs)
        for (key, _context, _continuation), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that each begin with the last token of the one before."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(window)) for window in cut]
            windows.extend(found)
            counts.append(len(found))
        each = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(each)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text for each prompt, up to the first of its stop strings."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        stops: list[list[str]] = []
        end = self._texts.decode([self.eot_token_id], skip_special_tokens=False)
        for context, given in (request.args for request in requests):
            options = dict(normalize_gen_kwargs(given, MAX_GEN_TOKENS))
            until = handle_stop_sequences(options.pop("until", None), eos=end)
            params.append(sampling_of(options, until))
            room = self.max_length - params[-1].max_new_tokens
            if room < 1:
                raise ValueError(
                    f"a task asks for {params[-1].max_new_tokens} new tokens, and max_length is {self.max_length}: "
                    "give a larger one"
                )
            prompts.append(self.tok_encode(context)[-room:])
            stops.append(until)
        made = self._scoring.continuations(prompts, params)
        texts = [
            postprocess_generated_text(self._texts.decode(ids), until, None)
            for ids, until in zip(made, stops, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


@register_model("tp_mamba")
class CheckpointModel(ScoredModel):
    """As lm_eval's own command makes it: ``lm_eval --model tp_mamba --model_args pretrained=FOLDER``.

    Under torchrun every rank runs that command, asks the same, and computes its part.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        max_prefill_tokens: int = 8192,
        batch_size: int | str | None = None,
        device: str | None = None,
    ) -> None:
        """Load the model.

        Args:
            pretrained: a folder, or a Hugging Face model name.
            tokenizer: where it is, if not with the checkpoint.
            dtype: of the weights, by default the checkpoint's.
            max_length: tokens of a window.
            max_batch_size: sequences that run at a time, by default what the memory has room for, at most 256.
            max_prefill_tokens: prompt tokens of one forward pass.
            batch_size: ``max_batch_size``, if that is not given and this is a number above 1, lm_eval's default.
            device: ``cpu``, or a GPU; by default a GPU if there is one.
        """
        tp = make_tensor_parallel(None if device is None else device.partition(":")[0], None)
        model = MambaForCausalLM.from_pretrained(pretrained, tp=tp, dtype=dtype)
        if max_batch_size is None and str(batch_size).isdecimal() and int(str(batch_size)) > 1:
            max_batch_size = int(str(batch_size))
        place = tokenizer or pretrained
        encoder = load_tokenizer(place, tp)
        engine = Engine(model, encoder, max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens)
        engine.start()
        texts = Texts(encoder, place, model.config.eos_token_ids)
        super().__init__(Scoring(engine), texts, max_length)
