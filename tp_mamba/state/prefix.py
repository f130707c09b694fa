"""States of prompts kept for later prompts that begin alike.

A recurrent state stands for all tokens before it, so it can be reused in one place only: behind exactly those tokens.
A kept state is therefore a :class:`Snapshot` that knows its tokens and their count, lies in a slot of its own, holds
the convolution's part and the scan's together, and is never changed: who continues it takes a copy.

Snapshots hang in a radix tree over token ids. A prompt walks down the tree as far as its tokens agree. The deepest
snapshot on its way is the hit. The place where it leaves all known paths is a junction, which gets a snapshot too: what
two prompts share, a third will share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

WORTHWHILE = 32
"""Tokens that a snapshot must save beyond the one before it; nearer ones would cost more steps than they spare."""


class SnapshotCache(Protocol):
    """What a prefix cache asks of the cache in whose slots its snapshots lie, a MambaCache."""

    @property
    def num_free(self) -> int:
        """Slots that :meth:`allocate` can still hand out."""

    def allocate(self) -> int:
        """Take a free slot."""

    def free(self, slot: int) -> None:
        """Give it back."""

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` the same sequence as ``source``."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state behind the first ``count`` tokens of a prompt."""

    count: int
    """Tokens that it stands for, exactly."""
    slot: int
    """Where it lies; nobody advances this slot."""


@dataclass(slots=True, eq=False)
class _Node:
    """A place in the tree: the tokens from its parent to here, and the snapshot of all tokens up to here."""

    edge: np.ndarray
    """Token ids between the parent and this node, int64; empty at the root alone."""
    depth: int
    """Tokens from the root to here."""
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    """By the first token of each child's edge."""
    snapshot: Snapshot | None = None

    def tokens(self) -> np.ndarray:
        """All token ids from the root to here."""
        edges, node = [], self
        while node.parent is not None:
            edges.append(node.edge)
            node = node.parent
        return np.concatenate(edges[::-1]) if edges else self.edge


class PrefixCache:
    """At most ``capacity`` snapshots, the least recently used of which makes room for the next.

    Used is what a prompt begins with, and what a state that is kept anew goes on from.

    It decides by the tokens alone, so ranks that make the same calls in the same order keep the same snapshots in the
    same slots.

    Attributes:
        capacity: snapshots at a time.
        block_size: tokens between two snapshots of a long prompt; None keeps only junctions and ends.
        hits: prompts that began at a snapshot so far.
        hit_tokens: prompt tokens that need not be computed because of that.
    """

    def __init__(self, cache: SnapshotCache, capacity: int, block_size: int | None = None) -> None:
        """Keep snapshots in slots of ``cache``, which must have ``capacity`` slots beside those of running sequences.

        Raises:
            ValueError: a capacity or a block size below 1.
        """
        for name, value in (("capacity", capacity), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} keeps no snapshot: it is at least 1")
        self.capacity, self.block_size = capacity, block_size
        self.hits = self.hit_tokens = 0
        self._cache = cache
        self._root = _Node(np.empty(0, np.int64), 0, None)
        self._used: OrderedDict[_Node, None] = (
            OrderedDict()
        )  # nodes with a snapshot, the least recently used first

    def __len__(self) -> int:
        return len(self._used)

    def longest(self, prompt: Sequence[int]) -> Snapshot | None:
        """The snapshot of the longest beginning of ``prompt`` that leaves at least one token to compute.

        That token's logits choose the next one, and a snapshot has none.
        """
        node = self._deepest(prompt)
        return None if node is None else node.snapshot

    def use(self, prompt: Sequence[int]) -> Snapshot | None:
        """As :meth:`longest`; the snapshot counts as used now, and as a hit."""
        node = self._deepest(prompt)
        if node is None:
            return None
        assert node.snapshot is not None
        self._used.move_to_end(node)
        self.hits += 1
        self.hit_tokens += node.snapshot.count
        return node.snapshot

    def cuts(self, prompt: Sequence[int], start: int = 0) -> list[int]:
        """Where ``prompt``, computed from token ``start`` on, should leave snapshots: token counts, ascending.

        At its end, at every multiple of ``block_size``, and at the junction where it leaves the prompts known so far,
        which lies before its last token if all of it is known: asked a third time, it computes that token alone.
        What lies within :data:`WORTHWHILE` tokens of ``start`` or of the next one to keep saves too little.
        """
        length = len(prompt)
        junction = min(self._path(np.asarray(prompt, np.int64))[1], length - 1)
        wanted = {length, junction}
        if self.block_size is not None:
            wanted.update(range(self.block_size, length, self.block_size))
        kept: list[int] = []
        # From the end backwards: the longer of two neighbours saves more. The junction is where others come by.
        for count in sorted(wanted, reverse=True):
            near = kept and kept[-1] - count < WORTHWHILE and count != junction
            if count - start >= WORTHWHILE and not near:
                kept.append(count)
        return kept[::-1]

    def put(self, tokens: Sequence[int], slot: int) -> None:
        """Keep a copy of ``slot``, whose state stands for exactly ``tokens``.

        Does nothing where that state is kept already (it counts as used), or where no slot can be had.
        """
        node = self._known(tokens)
        if node is not None:
            self._used.move_to_end(node)
            return
        self._make_room()
        if not self._cache.num_free:
            return
        mine = self._cache.allocate()
        self._cache.copy(slot, mine)
        self._keep(tokens, mine)

    def give(self, tokens: Sequence[int], slot: int) -> None:
        """As :meth:`put`, of a slot that its holder needs no longer: it is kept without a copy, or freed."""
        node = self._known(tokens)
        if node is not None:
            self._used.move_to_end(node)
            self._cache.free(slot)
            return
        self._make_room()
        self._keep(tokens, slot)

    def drop_oldest(self) -> bool:
        """Give up the least recently used snapshot, and its slot; whether there was one."""
        if not self._used:
            return False
        node, _ = self._used.popitem(last=False)
        assert node.snapshot is not None
        self._cache.free(node.snapshot.slot)
        node.snapshot = None
        _prune(node)
        return True

    def clear(self) -> None:
        """Give up every snapshot."""
        while self.drop_oldest():
            pass

    def snapshots(self) -> Iterator[tuple[np.ndarray, Snapshot]]:
        """Every snapshot with its token ids (int64), the least recently used first."""
        for node in self._used:
            assert node.snapshot is not None
            yield node.tokens(), node.snapshot

    def _path(self, tokens: np.ndarray) -> tuple[list[_Node], int]:
        """The nodes that ``tokens`` passes or ends at, from the root on, and how many of its tokens the tree knows."""
        node, passed = self._root, [self._root]
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None:
                return passed, node.depth
            equal = common_length(child.edge, tokens[node.depth :])
            if equal < len(child.edge):
                return passed, node.depth + equal
            node = child
            passed.append(node)
        return passed, node.depth

    def _deepest(self, prompt: Sequence[int]) -> _Node | None:
        """The node of :meth:`longest`."""
        passed, _ = self._path(np.asarray(prompt, np.int64)[: len(prompt) - 1])
        return next((node for node in reversed(passed) if node.snapshot is not None), None)

    def _known(self, tokens: Sequence[int]) -> _Node | None:
        """The node that holds a snapshot of exactly ``tokens``."""
        node = self._path(np.asarray(tokens, np.int64))[0][-1]
        return node if node.snapshot is not None and node.depth == len(tokens) else None

    def _make_room(self) -> None:
        while len(self._used) >= self.capacity:
            self.drop_oldest()

    def _keep(self, tokens: Sequence[int], slot: int) -> None:
        node = self._insert(np.asarray(tokens, np.int64))
        node.snapshot = Snapshot(node.depth, slot)
        # What it goes on from counts as used too, so that no beginning is given up before what goes on from it.
        for before in self._path(node.tokens())[0]:
            if before.snapshot is not None and before is not node:
                self._used.move_to_end(before)
        self._used[node] = None

    def _insert(self, tokens: np.ndarray) -> _Node:
        """The node at the end of ``tokens``, made where there is none."""
        passed, known = self._path(tokens)
        node = passed[-1]
        if node.depth < known:
            node = _split(node.children[int(tokens[node.depth])], known - node.depth)
        if node.depth < len(tokens):
            leaf = _Node(tokens[node.depth :].copy(), len(tokens), node)
            node.children[int(leaf.edge[0])] = leaf
            node = leaf
        return node


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many of the first elements of ``a`` and ``b`` are equal."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _split(node: _Node, length: int) -> _Node:
    """A new node on the edge to ``node``, ``length`` tokens behind its parent."""
    parent = node.parent
    assert parent is not None
    middle = _Node(node.edge[:length], parent.depth + length, parent)
    parent.children[int(node.edge[0])] = middle
    node.edge, node.parent = node.edge[length:], middle
    middle.children[int(node.edge[0])] = node
    return middle


def _prune(node: _Node) -> None:
    """Remove what leads to no snapshot, and join edges between which nothing branches off any more."""
    while node.parent is not None and node.snapshot is None and not node.children:
        del node.parent.children[int(node.edge[0])]
        node = node.parent
    if node.parent is not None and node.snapshot is None and len(node.children) == 1:
        (child,) = node.children.values()
        child.edge, child.parent = np.concatenate([node.edge, child.edge]), node.parent
        node.parent.children[int(child.edge[0])] = child
