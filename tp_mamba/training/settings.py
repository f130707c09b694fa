"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from tp_mamba.quoting import quoted

CHANGEABLE: Final = frozenset(
    {
        "steps",
        "eval_every",
        "valid_batches",
        "save_every",
        "keep",
        "log_every",
        "patience",
        "micro_batches",
        "max_seconds",
    }
)
"""What may differ when a run goes on: it decides how far, how often, and in how many parts, not what is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How to train.

    Raises:
        ValueError: a value out of its range, or values that do not fit one another.
    """

    steps: int
    """Updates of the parameters."""
    batch_size: int = 32
    """Rows of a step, over all ranks."""
    sequence_length: int = 1024
    """Tokens of a row: what a gradient reaches back over, at most."""
    micro_batches: int = 1
    """Parts of a step that are computed one after the other, to save memory; their gradients are added."""
    lr: float = 1e-3
    """Largest learning rate."""
    min_lr: float | None = None
    """Learning rate of the last step; None: a tenth of ``lr``."""
    warmup: int | None = None
    """Steps until ``lr``; None: a hundredth of all, at least one."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """Largest norm of all gradients together."""
    seed: int = 0
    """Of the initial values and of the order of the data."""
    eval_every: int = 0
    """Steps between validations; 0: only at the end."""
    valid_batches: int = 0
    """Batches of a validation; 0: all there are."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints that are kept, the best by validation not counted."""
    log_every: int = 10
    """Steps between records of the training loss."""
    patience: int = 0
    """Validations without a better loss after which training ends; 0: never."""
    max_seconds: float = 0.0
    """Time after which training ends, at the end of a step; 0: none. The learning rate falls in time for it, so that
    what is computed then depends on the speed."""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("sequence_length", 1),
            ("micro_batches", 1),
            ("keep", 1),
            ("log_every", 1),
            ("eval_every", 0),
            ("valid_batches", 0),
            ("save_every", 0),
            ("patience", 0),
            ("seed", 0),
        ):
            _check_whole(name, getattr(self, name), least)
        for name in ("lr", "clip", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {quoted(value)}, it must be a finite number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {quoted(getattr(self, name))}, it must be at least 0 and below 1"
                )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(
                f"weight_decay is {quoted(self.weight_decay)}, it must be a finite number of at least 0"
            )
        if not self.max_seconds >= 0:
            raise ValueError(f"max_seconds is {quoted(self.max_seconds)}, it must be at least 0")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr is {quoted(self.min_lr)}, it must be between 0 and lr ({self.lr:g})")
        if self.warmup is not None:
            _check_whole("warmup", self.warmup, 0)
            if self.warmup >= self.steps:
                raise ValueError(
                    f"warmup is {self.warmup} of {self.steps} steps: leave steps to learn in after it"
                )
        if self.patience and not self.eval_every:
            raise ValueError("patience counts validations, and eval_every is 0: set eval_every as well")

    @property
    def least_lr(self) -> float:
        """``min_lr`` or what it stands for."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def warmup_steps(self) -> int:
        """``warmup`` or what it stands for."""
        return max(1, self.steps // 100) if self.warmup is None else self.warmup

    def check_ranks(self, M: int) -> None:
        """Refuse a batch that does not divide over ``M`` data ranks.

        Raises:
            ValueError: it does not.
        """
        parts = M * self.micro_batches
        if self.batch_size % parts:
            raise ValueError(
                f"a batch of {self.batch_size} rows does not divide by {M} data ranks times {self.micro_batches} micro "
                f"batches: make it a multiple of {parts}"
            )

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def refuse_other(self, saved: dict[str, Any], where: Path) -> None:
        """Refuse to go on with a run that was begun with other settings than these.

        Raises:
            ValueError: one that decides what is computed differs.
        """
        for field in fields(self):
            if field.name in CHANGEABLE or field.name not in saved:
                continue
            if (now := getattr(self, field.name)) != (then := saved[field.name]):
                raise ValueError(
                    f"{where.name} was trained with {field.name} {quoted(then)}, and now it is {quoted(now)}: give the "
                    "same to go on, or begin a new run with --out"
                )


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {quoted(value)}, it must be a whole number of at least {least}")
