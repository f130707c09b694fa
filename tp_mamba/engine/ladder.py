"""The capacities that steps are padded to, so that one captured graph serves many steps.

Three measurements decide them. A padded row of a decode step costs little, so batch sizes double, then go by half as
much again. A padded token of a prompt costs as much as a real one where products are bound by arithmetic, from some 256
tokens on, so from there the ladder has four rungs for every doubling. And a step of more tokens keeps a GPU busy for
longer than the host takes to launch it, so it is better run as it is, without padding and without memory of its own.

How many sequences a mixed step has room for is a second size: the scan's launch follows from it, and one long prompt
must not be cut like a batch of hundreds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile

MAX_TOKENS = 2048
"""Tokens of the largest mixed step that is captured: 45 ms of falcon-mamba-7b on an H100."""

_FINE_FROM = 256
"""Tokens from which padding is paid for in time."""


@dataclass(frozen=True, slots=True, order=True)
class Rung:
    """What one captured step has room for."""

    tokens: int
    """Packed tokens; of a decode step as many as rows."""
    sequences: int
    """Rows: sequences that are taken in, or decoded."""
    decodes: bool
    """Whether it is a decode step, a token for each row. In the others every row is a prompt or a piece of one; a row
    that decodes goes as a piece of one token that continues its state, which is the same recurrence in the same
    order."""


class Ladder:
    """All rungs for at most ``slots`` sequences and ``max_prefill_tokens`` prompt tokens a step."""

    def __init__(self, slots: int, max_prefill_tokens: int) -> None:
        self._rows = _up_to(slots, _row_sizes())
        self._tokens = _up_to(min(MAX_TOKENS, slots + max_prefill_tokens), _token_sizes())
        self._sequences = _up_to(slots, iter((1, 8, 64)))

    @property
    def largest(self) -> Rung:
        """The mixed step that takes most memory."""
        tokens = self._tokens[-1]
        return Rung(tokens, min(tokens, self._sequences[-1]), decodes=False)

    def rungs(self) -> list[Rung]:
        """Every rung, the largest first."""
        mixed = {Rung(T, min(S, T), decodes=False) for T in self._tokens for S in self._sequences}
        return sorted(mixed, reverse=True) + [Rung(B, B, decodes=True) for B in reversed(self._rows)]

    def for_step(self, tokens: int, sequences: int, *, decodes: bool) -> Rung | None:
        """The least rung with room for a step of ``tokens`` in ``sequences`` rows; None: it is above the ladder."""
        if decodes:
            rows = self._rows[bisect_left(self._rows, sequences)]
            return Rung(rows, rows, decodes=True)
        if tokens > self._tokens[-1]:
            return None
        room = self._tokens[bisect_left(self._tokens, tokens)]
        return Rung(room, min(room, self._sequences[bisect_left(self._sequences, sequences)]), decodes=False)


def _up_to(limit: int, sizes: Iterator[int]) -> list[int]:
    """Those of the ascending ``sizes`` below ``limit``, and ``limit``."""
    return [*takewhile(lambda size: size < limit, sizes), limit]


def _row_sizes() -> Iterator[int]:
    """1, 2, 4, 8, 16, 32, 48, 64, 96, 128, ..."""
    yield from (1, 2, 4, 8, 16)
    for power in count(5):
        yield from (2**power, 2**power + 2 ** (power - 1))


def _token_sizes() -> Iterator[int]:
    """16, 32, 64, 128, then 256, 320, 384, 448, 512, 640, ..."""
    yield from (16, 32, 64, 128)
    for power in count(_FINE_FROM.bit_length() - 1):
        yield from (2**power + quarter * 2 ** (power - 2) for quarter in range(4))
