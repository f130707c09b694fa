"""From a schedule to one forward pass, eager or captured, and the way of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tp_mamba.engine.buffers import StepBuffers, StepInputs, StepTensors, TokenReturn
from tp_mamba.engine.checks import check_step, check_tensors
from tp_mamba.engine.graphs import Capture, CaptureReport, StepGraphs
from tp_mamba.engine.ladder import Ladder, Rung
from tp_mamba.engine.model import Cache, Model, cuts_logits
from tp_mamba.engine.prompt_scores import Asked, PromptScorer, PromptScores
from tp_mamba.engine.scheduler import Schedule


class Runner:
    """Runs scheduled passes of one model on one state cache; nothing here waits for the device.

    With a ladder, a step is padded to its rung, and captured or replayed; without one, and above the ladder, it runs
    eagerly as it is.

    Bits. Padding touches nothing, and a replay gives the bits of the eager call that was captured. A row's results do
    not depend on what the other rows of its rung hold, nor on whether they are padding. Between two rungs, or a rung
    and the exact shape, they may differ in rounding, wherever the library or the kernel of a product is chosen by the
    number of rows (in_proj, x_proj, out_proj, dt_proj of prompts, the head): equal where the choice is the same. A row
    that decodes in a mixed step goes through the kernels of a prompt; recurrence, convolution and norms give the same
    bits there, dt_proj those of its product.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        slots: int,
        max_prefill_tokens: int,
        *,
        ladder: Ladder | None = None,
        capture: Capture | None = None,
        check_steps: bool = False,
        cut_logits: bool = False,
        scorer: PromptScorer | None = None,
    ) -> None:
        """For sequences in ``slots`` slots of ``cache``, and as many prompt tokens a step.

        Args:
            ladder: what steps are padded to.
            capture: how the steps of a ladder are captured; None runs them eagerly at the ladder's capacities.
            check_steps: compare every index of a step with what it may be, before the step is launched; the host then
                waits for the device in every step.
            cut_logits: leave each rank its own columns of the logits, where the model can.
            scorer: scores prompts; None where nobody asks for that.
        """
        self._model, self._cache, self._slots = model, cache, slots
        self.logits_are_cut = cut_logits and cuts_logits(model)
        self._options = {"whole_vocab": False} if self.logits_are_cut else {}
        self._vocab_size = model.config.vocab_size
        self._check, self._scorer = check_steps, scorer
        self._buffers = StepBuffers(slots, max_prefill_tokens, self._vocab_size, model.device)
        self._return = TokenReturn(slots, model.device)
        self._graphs = None if ladder is None else StepGraphs(ladder, capture)
        self._answers = torch.empty(0, dtype=torch.int64)
        self._logits: torch.Tensor | None = None
        self._rung: Rung | None = None

    @property
    def captured(self) -> CaptureReport:
        """What capturing has cost so far."""
        return CaptureReport() if self._graphs is None else self._graphs.report

    def forward(self, schedule: Schedule) -> torch.Tensor:
        """Run one pass and count its prompt tokens as taken.

        Returns:
            float32 logits ``[B, V]``, one row for each of ``schedule.sampling``; they stand until the next pass.
        """
        step = self._inputs(schedule)
        if self._check:
            check_step(step, schedule, self._slots, self._vocab_size)
        rung = None
        if self._graphs is not None:
            rung = self._graphs.ladder.for_step(
                step.num_tokens, step.num_sequences, decodes=step.only_decodes
            )
        logits = self._run_exact(step) if rung is None else self._run(step, rung)
        self._advance(schedule)
        return logits

    @staticmethod
    def _advance(schedule: Schedule) -> None:
        for chunk in schedule.chunks:
            chunk.request.taken += chunk.length

    def forward_scoring(self, schedule: Schedule, asked: Asked) -> tuple[torch.Tensor, PromptScores]:
        """As :meth:`forward`, and the scores of the prompts' tokens that are ``asked`` about.

        Such a pass runs eagerly, as it is: its hidden states are looked at again.
        """
        assert self._scorer is not None
        step = self._inputs(schedule)
        if self._check:
            check_step(step, schedule, self._slots, self._vocab_size)
        tensors = self._fill(step)
        self._answers = tensors.answers
        ids = self._buffers.table.index_select(0, tensors.places)
        model: Any = self._model
        hidden = model.forward_hidden(ids, tensors.metadata, self._cache)
        logits, scores = model.logits(hidden, tensors.wanted, **self._options), self._scorer(hidden, asked)
        self._advance(schedule)
        return logits, scores

    def give(self, tokens: torch.Tensor) -> Callable[[], list[int]]:
        """Let the sequences of the last pass go on from ``tokens [B]``, one for each row of its logits.

        A negative one, which is no token, is replaced by id 0: what follows it is the caller's to discard.

        Returns:
            What waits for the tokens and returns them; called before the third next pass.
        """
        self._buffers.table.index_copy_(0, self._answers, tokens.clamp(min=0))
        return self._return.send(tokens)

    def repeat(self) -> None:
        """Run the last padded pass once more, from what lies in the buffers: to time it without the host's part.

        Raises:
            ValueError: there was none.
        """
        if self._graphs is None or self._rung is None:
            raise ValueError("no padded step was run that could be repeated: run one of the ladder's first")
        self._graphs(self._rung, self._run_padded)

    def _inputs(self, schedule: Schedule) -> StepInputs:
        decodes, chunks, place = schedule.decodes, schedule.chunks, self._buffers.place_of_slot
        slots: list[int] = [request.slot for request in decodes]  # type: ignore[misc]  # those that run have one
        step = StepInputs(decode_slots=slots, wanted=list(range(len(decodes))))
        step.places.extend(map(place, slots))
        step.answers.extend(step.places)
        for chunk in chunks:
            slot: int = chunk.request.slot  # type: ignore[assignment]
            step.prefill_slots.append(slot)
            step.prefill_lengths.append(chunk.length)
            step.continues.append(chunk.start > 0)
            step.places.extend(chunk.request.prompt[chunk.start : chunk.start + chunk.length])
            if chunk.answers:
                step.wanted.append(step.num_tokens - 1)
                step.answers.append(place(slot))
        return step

    def _fill(self, step: StepInputs, rung: Rung | None = None) -> StepTensors:
        tensors = self._buffers.fill(step, rung)
        if self._check:
            check_tensors(tensors, self._slots, self._vocab_size)
        return tensors

    def _run_exact(self, step: StepInputs) -> torch.Tensor:
        tensors = self._fill(step)
        self._answers = tensors.answers
        ids = self._buffers.table.index_select(0, tensors.places)
        return self._model.forward_packed(
            ids, tensors.metadata, self._cache, logits_indices=tensors.wanted, **self._options
        )

    def _run(self, step: StepInputs, rung: Rung) -> torch.Tensor:
        assert self._graphs is not None
        if self._graphs.needs_room(rung):
            self._fill(StepInputs(), self._graphs.ladder.largest)
            self._graphs.reserve(self._run_padded)
        self._answers = self._fill(step, rung).answers[: len(step.wanted)]
        self._graphs(rung, self._run_padded)
        self._rung = rung
        assert self._logits is not None
        return self._logits[: len(step.wanted)]

    def _run_padded(self, rung: Rung) -> None:
        """The step that lies in the buffers, padded to ``rung``; its logits go to where all such steps leave them."""
        tensors = self._buffers.views(rung)
        ids = self._buffers.table.index_select(0, tensors.places)
        logits = self._model.forward_packed(
            ids, tensors.metadata, self._cache, logits_indices=tensors.wanted, **self._options
        )
        if self._logits is None:  # the first such step is never one that is captured
            self._logits = torch.empty(self._slots, logits.shape[1], dtype=logits.dtype, device=logits.device)
        self._logits[: len(logits)].copy_(logits)
