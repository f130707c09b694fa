"""Documents laid into rows of a fixed length, in an order that seed and position alone decide.

A row holds at most ``L`` tokens that are read, each with the next one of its document as its target, so no token but a
document's first is left unpredicted and no document runs into the next. Documents longer than a row are cut into
pieces of ``L``, each epoch at other places; pieces that are shorter share rows. A row belongs to no rank: a step takes
the next rows, and ranks and accumulated parts divide these among them, so the number of ranks changes no loss.

Letters: ``T`` packed tokens, ``S`` sequences, ``L`` the length of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tp_mamba.training.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one epoch, in their order. Row ``r`` is the parts ``edges[r]`` up to ``edges[r + 1]``."""

    starts: np.ndarray
    """``[parts]`` int64: where a part's first token is, in the run of all tokens."""
    lengths: np.ndarray
    """``[parts]`` int64: tokens of a part; one more is the target of its last."""
    edges: np.ndarray
    """``[rows + 1]`` int64"""

    def __len__(self) -> int:
        return len(self.edges) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the parts of row ``index``."""
        parts = slice(self.edges[index], self.edges[index + 1])
        return self.starts[parts], self.lengths[parts]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """What one rank computes at a time."""

    ids: np.ndarray
    """``[T]`` int64"""
    targets: np.ndarray
    """``[T]`` int64: the token that follows each."""
    lengths: tuple[int, ...]
    """``[S]``: tokens of each sequence."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far the data has been read: all before row ``row`` of epoch ``epoch``."""

    epoch: int = 0
    row: int = 0


def lay_rows(bounds: np.ndarray, length: int, rng: np.random.Generator | None) -> Rows:
    """The rows of one epoch.

    Args:
        bounds: ``[documents + 1]`` int64, as :attr:`Tokens.bounds`.
        length: ``L``.
        rng: decides where long documents are cut and the order; None cuts at multiples of L, and keeps the order.
    """
    starts, lengths = _pieces(bounds, length, rng)
    whole = lengths == length
    short_starts, short_lengths = starts[~whole], lengths[~whole]
    if rng is not None:
        order = rng.permutation(len(short_starts))
        short_starts, short_lengths = short_starts[order], short_lengths[order]
    shared = _share(short_starts, short_lengths, length)
    count = int(whole.sum())
    rows = Rows(
        np.concatenate([starts[whole], shared.starts]),
        np.concatenate([lengths[whole], shared.lengths]),
        np.concatenate([np.arange(count), count + shared.edges]),
    )
    return rows if rng is None else _reordered(rows, rng.permutation(len(rows)))


def _pieces(
    bounds: np.ndarray, length: int, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of pieces of at most ``length``, document by document; the last token is only a target."""
    sizes = np.maximum(np.diff(bounds) - 1, 0)
    first = np.zeros_like(sizes)  # the length of a first piece that is shorter than the others
    if rng is not None:
        first = np.where(sizes > length, rng.integers(0, length, len(sizes)), 0)
    counts = (first > 0) + -(-(sizes - first) // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.where(first[document] > 0, number * length - length + first[document], number * length)
    end = np.minimum(begin + length, sizes[document])
    begin = np.maximum(begin, 0)
    return bounds[:-1][document] + begin, end - begin


def _share(starts: np.ndarray, lengths: np.ndarray, length: int) -> Rows:
    """Short pieces one after the other, cut into rows; a piece that a cut falls into becomes two."""
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    cuts = (
        np.unique(np.concatenate([before, np.arange(0, total, length)])) if total else np.zeros(0, np.int64)
    )
    piece = np.searchsorted(before, cuts, side="right") - 1
    stops = np.append(cuts[1:], total) if total else cuts
    edges = (
        np.searchsorted(cuts, np.append(np.arange(0, total, length), total))
        if total
        else np.zeros(1, np.int64)
    )
    return Rows(starts[piece] + cuts - before[piece], stops - cuts, edges.astype(np.int64))


def _reordered(rows: Rows, order: np.ndarray) -> Rows:
    counts = np.diff(rows.edges)[order]
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    within = np.arange(edges[-1]) - np.repeat(edges[:-1], counts)
    parts = np.repeat(rows.edges[:-1][order], counts) + within
    return Rows(rows.starts[parts], rows.lengths[parts], edges)


class DataOrder:
    """Rows without end, epoch after epoch, from any position on."""

    def __init__(self, tokens: Tokens, length: int, seed: int, position: Position | None = None) -> None:
        """Rows of ``length`` tokens.

        Raises:
            ValueError: no document has two tokens.
        """
        self._tokens, self._length, self._seed = tokens, length, seed
        self.position = position or Position()
        self._epoch = -1
        self._rows: Rows | None = None
        if not len(self._rows_of(self.position.epoch)):
            raise ValueError(
                "the data has no document of two tokens or more, and one token alone has no next: give more text"
            )

    def take(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The next ``count`` rows, each as starts and lengths of its parts; the position moves on."""
        taken: list[tuple[np.ndarray, np.ndarray]] = []
        epoch, row = self.position.epoch, self.position.row
        while len(taken) < count:
            rows = self._rows_of(epoch)
            if row >= len(rows):
                epoch, row = epoch + 1, 0
                continue
            taken.append(rows.row(row))
            row += 1
        self.position = Position(epoch, row)
        return taken

    def _rows_of(self, epoch: int) -> Rows:
        if self._rows is None or self._epoch != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch, self._rows = epoch, lay_rows(self._tokens.bounds, self._length, rng)
        return self._rows


def pack(tokens: Tokens, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> PackedBatch:
    """The tokens of ``rows`` as one packed batch; each part of a row is a sequence of its own."""
    starts = np.concatenate([row[0] for row in rows]) if rows else np.zeros(0, np.int64)
    lengths = np.concatenate([row[1] for row in rows]) if rows else np.zeros(0, np.int64)
    before = np.cumsum(lengths) - lengths
    where = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return PackedBatch(
        tokens.ids[where].astype(np.int64), tokens.ids[where + 1].astype(np.int64), tuple(map(int, lengths))
    )


def divide(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], part: int, parts: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Part ``part`` of ``parts``: rows next to each other, as many in each part as can be."""
    edges = [len(rows) * i // parts for i in (part, part + 1)]
    return list(rows[edges[0] : edges[1]])


def count_tokens(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    """Targets of ``rows``."""
    return sum(int(lengths.sum()) for _, lengths in rows)
