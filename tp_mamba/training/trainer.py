"""The training loop: steps, validations, checkpoints, and what ends it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tp_mamba.batch import packed_sequences
from tp_mamba.model import MambaForCausalLM
from tp_mamba.training.data_parallel import average_over_data, masters_of, shard_over_data
from tp_mamba.training.flops import flops_per_token, peak_flops
from tp_mamba.training.metrics import Metrics
from tp_mamba.training.optimizer import (
    clip_gradients,
    gradient_norms,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    set_step,
)
from tp_mamba.training.packing import DataOrder, PackedBatch, Position, count_tokens, divide, lay_rows, pack
from tp_mamba.training.ranks import Ranks
from tp_mamba.training.saver import Saver, read_run, read_tensors, step_folder
from tp_mamba.training.settings import TrainSettings
from tp_mamba.training.state import copy_in, copy_out, room_for
from tp_mamba.training.tokens import Tokens

Progress = Callable[[int, int, dict[str, float]], None]
"""``progress(step, steps, values)``, after each step."""


class DivergedError(RuntimeError):
    """The loss or a gradient is no finite number; the message names the step and the parameter."""


@dataclass(slots=True)
class Best:
    """The best validation so far."""

    step: int = 0
    loss: float = math.inf
    since: int = 0
    """Validations after it."""


class Clock:
    """How much of the time that training may take is over, from 0 to 1.

    What the first step takes, kernels that are compiled included, is not training: a schedule must not jump over it.
    """

    def __init__(self, seconds: float) -> None:
        """From now on; 0: there is no end of it."""
        self._end = time.monotonic() + (seconds or math.inf)
        self._start: float | None = None

    def spent(self) -> float:
        """Asked once at the end of each step."""
        now = time.monotonic()
        if now >= self._end:
            return 1.0
        if self._start is None:
            self._start = now
        return 0.0 if math.isinf(self._end) else (now - self._start) / (self._end - self._start)


class Trainer:
    """One rank's part of a training run.

    Attributes:
        model: with float32 master parameters, over ``ranks.tp``.
        step: updates done.
        best: the best validation.
    """

    def __init__(
        self,
        model: MambaForCausalLM,
        settings: TrainSettings,
        ranks: Ranks,
        train: Tokens,
        valid: Tokens | None,
        run: Path,
        *,
        compute_dtype: torch.dtype = torch.float32,
        tensorboard: bool = False,
    ) -> None:
        """Prepare to train; every rank calls this with the same arguments.

        Args:
            model: trainable, with float32 parameters, whole or on this rank's slice alike on all data ranks.
            train, valid: the data; None or no pair of tokens to predict: no validation.
            run: the folder for checkpoints and metrics.
            compute_dtype: what ``model`` computes in.
            tensorboard: whether to write events for it.

        Raises:
            ValueError: a batch that does not divide over the ranks, or data without two tokens in a document.
        """
        settings.check_ranks(ranks.dp.size)
        self.model, self.settings, self.ranks, self.run = model, settings, ranks, run
        self.step, self.best, self.stopped_early = 0, Best(), False
        self._train, self._order = train, DataOrder(train, settings.sequence_length, settings.seed)
        self._valid = valid if valid is not None and np.diff(valid.bounds).max(initial=0) > 1 else None
        shard_over_data(model, ranks, compute_dtype)
        self.masters = masters_of(model, ranks)
        self.optimizer = make_optimizer(
            self.masters,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self._saver = Saver(run, ranks, settings.keep)
        self._flops, self._peak = flops_per_token(model.config), peak_flops(ranks.world.device, compute_dtype)
        self._clock, self._time_spent = Clock(settings.max_seconds), 0.0
        self._tensorboard = tensorboard
        self._metrics: Metrics | None = None

    # --- one step

    def train_step(self) -> dict[str, float]:
        """One update from the next rows of the data; its loss per token, over all ranks, and the norm of gradients.

        Raises:
            DivergedError: the loss or a gradient is not finite; nothing was updated.
        """
        settings, ranks = self.settings, self.ranks
        rows = self._order.take(settings.batch_size)
        tokens, parts = count_tokens(rows), settings.micro_batches
        total = torch.zeros((), dtype=torch.float64, device=ranks.world.device)
        for part in range(parts):
            mine = divide(divide(rows, part, parts), ranks.dp.rank, ranks.dp.size)
            loss = self._loss(pack(self._train, mine))
            total += loss.detach()
            # Gradients are averaged over the data ranks, and the loss is a mean over the tokens of all of them.
            (loss * (ranks.dp.size / tokens)).backward()
        norm, mean = self._finish_gradients(total, tokens)
        lr = learning_rate(
            self.step + 1,
            peak=settings.lr,
            least=settings.least_lr,
            warmup=settings.warmup_steps,
            steps=settings.steps,
            time_spent=self._time_spent,
        )
        set_learning_rate(self.optimizer, lr)
        clip_gradients(self.masters, norm, settings.clip)
        self.optimizer.step()
        for master in self.masters:
            master.parameter.grad = master.local.grad = None
        self.step += 1
        return {"loss": mean, "grad_norm": norm, "lr": lr, "tokens": tokens}

    def _loss(self, batch: PackedBatch) -> torch.Tensor:
        device = self.ranks.world.device
        ids, targets = (torch.from_numpy(part).to(device) for part in (batch.ids, batch.targets))
        return self.model.loss(ids, targets, packed_sequences(batch.lengths, device), reduction="sum")

    def _finish_gradients(self, total: torch.Tensor, tokens: int) -> tuple[float, float]:
        """Gather, sum and check the gradients; their norm over all ranks, and the loss per token."""
        for master in self.masters:
            master.take_gradient()
        average_over_data(self.masters, self.ranks)
        counted = total if self.ranks.tp.rank == 0 else torch.zeros_like(total)
        # Clocks differ, and all ranks must do the same: the first one's decides.
        spent = torch.full_like(total, self._clock.spent() if self.ranks.is_owner else 0.0)
        norms, (summed, share) = gradient_norms(self.masters, self.ranks, torch.stack([counted, spent]))
        self._time_spent = float(share)
        norm, mean = float(norms.square().sum().sqrt()), float(summed) / tokens
        if not (math.isfinite(norm) and math.isfinite(mean)):
            raise DivergedError(self._where_it_broke(norms, mean))
        return norm, mean

    def _where_it_broke(self, norms: torch.Tensor, loss: float) -> str:
        """One sentence that names the step and the parameter; the same on every rank."""
        held = torch.stack([(~torch.isfinite(m.local.detach())).any() for m in self.masters])
        broken = self.ranks.world.all_reduce_(held.float()).cpu().nonzero().flatten().tolist()
        step = self.step + 1
        found = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        if broken:
            what = f"the parameter {self.masters[broken[0]].name} holds values that are not finite"
        else:
            # Backward goes from the last parameter to the first, and what breaks stays broken.
            last = max((i for i, norm in enumerate(norms.tolist()) if not math.isfinite(norm)), default=None)
            what = "every parameter and gradient is finite"
            if last is not None:
                what = f"the gradient of {self.masters[last].name} is the first in the backward pass that is not finite"
        return (
            f"step {step}: {found}, and {what}; nothing was updated and the checkpoints before it are as they were: "
            "resume from the last one with a smaller --lr, or look at the data of this step"
        )

    # --- validation

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss per token of the validation data, in nats, every document cut into rows at the same places.

        Raises:
            ValueError: there is none.
        """
        if self._valid is None:
            raise ValueError("there is no validation data: give some, or a fraction of the training data")
        settings, ranks = self.settings, self.ranks
        rows = lay_rows(self._valid.bounds, settings.sequence_length, None)
        size = settings.batch_size // settings.micro_batches
        batches = range(0, len(rows), size)[: settings.valid_batches or None]
        total = torch.zeros(2, dtype=torch.float64, device=ranks.world.device)
        for start in batches:
            all_rows = [rows.row(i) for i in range(start, min(start + size, len(rows)))]
            mine = divide(all_rows, ranks.dp.rank, ranks.dp.size)
            # All data ranks gather parameters together: one without rows computes one, and does not count it.
            loss = self._loss(pack(self._valid, mine or all_rows[:1]))
            if mine and ranks.tp.rank == 0:
                total += torch.stack(
                    [loss.double(), loss.new_tensor(count_tokens(mine), dtype=torch.float64)]
                )
        loss_sum, count = ranks.world.all_reduce_(total).tolist()
        return loss_sum / count

    # --- checkpoints

    def save(self) -> None:
        """Begin to write a checkpoint of this moment; training may go on."""
        info = {
            "step": self.step,
            "position": [self._order.position.epoch, self._order.position.row],
            "best": [
                self.best.step,
                self.best.loss if math.isfinite(self.best.loss) else None,
                self.best.since,
            ],
            "config": self.model.config.to_dict(),
            "settings": self.settings.to_dict(),
            "ranks": {"dp": self.ranks.dp.size, "tp": self.ranks.tp.size},
        }
        tensors = copy_out(self.masters, self.optimizer, self.ranks)
        self._saver.save(self.step, tensors, info, self.best.step or None)

    def load(self, step: int) -> None:
        """Go on from the checkpoint of ``step``, written at any number of ranks.

        Raises:
            CheckpointError: it is damaged.
            ValueError: it is of another model, or was trained with other settings.
        """
        folder = step_folder(self.run, step)
        with self.ranks.world.agreed():
            info = read_run(folder)
            check_model(self.model.config.to_dict(), info["config"], folder)
            self.settings.refuse_other(info["settings"], folder)
        described, rooms = room_for(self.masters, self.optimizer, self.ranks)
        read_tensors(folder, described, self.ranks)
        copy_in(self.masters, self.optimizer, rooms)
        set_step(self.optimizer, step)
        self.step = step
        best_step, best_loss, since = info["best"]
        self.best = Best(best_step, math.inf if best_loss is None else best_loss, since)
        self._order.position = Position(*info["position"])

    # --- the loop

    def fit(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train until the last step, or until validation gets no better; then what came of it.

        Raises:
            DivergedError: as :meth:`train_step`; the last checkpoint is whole.
            CheckpointWriteError: a checkpoint could not be written; the one before is whole.
        """
        if self.ranks.is_owner:
            self.run.mkdir(parents=True, exist_ok=True)
            self._metrics = Metrics(self.run, self.step, tensorboard=self._tensorboard)
        try:
            self._loop(progress)
            self._saver.wait()
        finally:
            self._saver.close()
            if self._metrics is not None:
                self._metrics.close()
        return {
            "steps": self.step,
            "best_step": self.best.step or None,
            "best_valid_loss": self.best.loss if self.best.step else None,
            "stopped_early": self.stopped_early,
            "out_of_time": self._time_spent >= 1,
        }

    def _loop(self, progress: Progress | None) -> None:
        settings, saved = self.settings, self.step
        tokens, since, waiting = 0, time.perf_counter(), 0.0
        while self.step < settings.steps and not (self._time_spent >= 1 or self._gets_no_better()):
            values = self.train_step()
            tokens += int(values.pop("tokens"))
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                seconds = max(1e-9, time.perf_counter() - since - waiting)
                values["tokens_per_second"] = tokens / seconds
                if self._peak is not None:
                    peak = self._peak * self.ranks.world.size
                    values["share_of_peak"] = self._flops * tokens / seconds / peak
                self._record(values)
                tokens, since, waiting = 0, time.perf_counter(), 0.0
            last = self.step == settings.steps or self._time_spent >= 1
            before = time.perf_counter()
            if self._valid is not None and (last or self._is_time(settings.eval_every)):
                values["valid_loss"] = self._validate()
            if last or self._is_time(settings.save_every) or self.best.step == self.step:
                self.save()
                saved = self.step
            waiting += time.perf_counter() - before
            if progress is not None:
                progress(self.step, settings.steps, values)
        if saved != self.step:
            self.save()

    def _is_time(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _gets_no_better(self) -> bool:
        self.stopped_early = 0 < self.settings.patience <= self.best.since
        return self.stopped_early

    def _validate(self) -> float:
        loss = self.evaluate()
        if loss < self.best.loss:
            self.best = Best(self.step, loss)
        else:
            self.best.since += 1
        self._record({"valid_loss": loss})
        return loss

    def _record(self, values: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.add(self.step, **values)


def check_model(now: dict[str, Any], then: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ValueError: the configurations differ, in a field that is named.
    """
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise ValueError(
                f"{folder.name} is of a model with {name} {then.get(name)!r}, and this one has {now.get(name)!r}: give "
                "the configuration that the run was begun with, or begin a new run with --out"
            )
