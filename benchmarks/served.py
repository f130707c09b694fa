"""What became of requests, and the rows of a recorded result that tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.report import Row


@dataclass(slots=True)
class Served:
    """What became of a request, in seconds after the beginning."""

    arrival: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.times[0] - self.arrival

    @property
    def per_token(self) -> float:
        """Mean seconds between its tokens, of which there are two or more."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def rows_of(case: str, served: Sequence[Served], seconds: float, ranks: int) -> list[Row]:
    """How long all took, with new tokens as the work; of each request its first token, and the mean between tokens."""
    where = {1: "one GPU", 2: "two GPUs"}.get(ranks, f"{ranks} GPUs")
    sizes: dict[str, int | str] = {"requests": len(served), "GPUs": ranks}
    tokens = sum(len(each.token_ids) for each in served)
    several = [each for each in served if len(each.times) > 1]
    return [
        Row(case=f"{case}, {where}", unit="s", sizes=sizes, samples=(seconds,), work=(tokens, "tokens")),
        *(
            Row(
                case=f"{case}, {where}, {what}",
                unit="ms",
                sizes=sizes,
                samples=tuple(1e3 * value for value in values),
            )
            for what, values in (
                ("first token", [each.first_token for each in served]),
                ("per token", [each.per_token for each in several]),
            )
        ),
    ]
