"""Calls one after the other, each on tensors of its own, captured in one CUDA graph.

This is how a decode step runs in a model: its weights and states come from memory, since those of all other layers
have been through the L2 in between, and nothing is launched from the host. The time of one call is the graph's,
divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

TRAFFIC = 256 << 20
"""Bytes that a chain goes through at least, several times the L2 of a GPU."""


LEAST, MOST = 8, 512
"""Calls of a chain: enough to share the gap between two replays, and no more than are captured in a moment."""


def links(bytes_a_call: float) -> int:
    """How many calls make a chain of :data:`TRAFFIC` bytes."""
    return min(MOST, max(LEAST, -(-TRAFFIC // max(1, int(bytes_a_call)))))


class Chain:
    """Runs ``calls`` in order; on a GPU a captured graph is replayed.

    Attributes:
        outputs: what each call returned. On a GPU every run writes into the same tensors.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device) -> None:
        self._calls = list(calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.outputs: list[Any] = []
        if device.type == "cuda":
            self._capture()

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self) -> None:
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def _run(self) -> None:
        self.outputs = [call() for call in self._calls]

    def _capture(self) -> None:
        # Not on the default stream, which cannot be captured; twice, so that all is compiled and chosen.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.outputs = []
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph
