"""Slot numbers: which are free, and how many hold each of the others."""

from __future__ import annotations

import heapq


class SlotPool:
    """Hands out the numbers ``0..size-1`` and counts who holds each.

    What the numbers stand for is the caller's. Ranks that acquire and release in the same order get the same numbers.
    """

    def __init__(self, size: int) -> None:
        """All ``size`` numbers are free."""
        self.size = size
        self._free = list(range(size))  # a heap: the lowest free number is handed out first
        self._holders: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Numbers that :meth:`acquire` can still hand out."""
        return len(self._free)

    def acquire(self) -> int:
        """The lowest free number, now with one holder.

        Raises:
            ValueError: none is free.
        """
        if not self._free:
            raise ValueError(
                f"no free slot: all {self.size} are in use, so free one first or make a cache with more slots"
            )
        slot = heapq.heappop(self._free)
        self._holders[slot] = 1
        return slot

    def share(self, slot: int) -> None:
        """Count one more holder of ``slot``; none of them may change what it stands for.

        Raises:
            ValueError: it is not in use.
        """
        self.check_used(slot)
        self._holders[slot] += 1

    def release(self, slot: int) -> None:
        """Count one holder of ``slot`` less; without any it is free.

        Raises:
            ValueError: it is not in use.
        """
        self.check_used(slot)
        self._holders[slot] -= 1
        if not self._holders[slot]:
            del self._holders[slot]
            heapq.heappush(self._free, slot)

    def holders(self, slot: int) -> int:
        """How many hold ``slot``; 0 if it is free."""
        return self._holders.get(slot, 0)

    def check_used(self, slot: int) -> None:
        """Refuse a slot that nobody holds.

        Raises:
            ValueError: it is not in use.
        """
        if slot not in self._holders:
            raise ValueError(
                f"slot {slot} is not in use (slots in use: {sorted(self._holders)}): pass one that allocate() returned"
            )
