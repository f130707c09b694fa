"""Words of rank 0 to the other ranks, passed from host to host: no GPU is waited for, and none waits."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

from tp_mamba.parallel.environment import backend_of
from tp_mamba.parallel.group import TensorParallel

INLINE_BYTES = 4096
"""Bytes of the one broadcast that carries a short message; a longer one takes a second broadcast."""

_LENGTH_BYTES = 8


class WordsOfRank0:
    """Passes picklable objects from rank 0 to all others, one small broadcast each.

    Over gloo even where the model's ranks communicate through NCCL: a broadcast there would stand in the GPU's queue
    behind the work of the last step, and whoever reads it would wait for that.
    """

    def __init__(self, tp: TensorParallel) -> None:
        """Every rank of ``tp`` makes one at the same point of its program."""
        self._tp = tp
        self._group: dist.ProcessGroup | None = None
        self._own = False
        if tp.size > 1:
            self._group = tp.process_group()
            if backend_of(self._group, "cpu") != "gloo":
                ranks = dist.get_process_group_ranks(self._group)
                self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
                self._own = True

    def pass_on(self, word: Any = None) -> Any:
        """Rank 0's ``word`` on every rank; the others pass nothing, and wait until it comes.

        Raises:
            RuntimeError: another rank has ended.
        """
        if self._group is None:
            return word
        buffer = torch.zeros(INLINE_BYTES, dtype=torch.uint8)
        content = b""
        if self._tp.rank == 0:
            content = pickle.dumps(word)
            head = len(content).to_bytes(_LENGTH_BYTES, "little") + content
            _fill(buffer, head[:INLINE_BYTES])
        dist.broadcast(buffer, group=self._group, group_src=0)
        if self._tp.rank > 0:
            head = buffer.numpy().tobytes()
            length, content = int.from_bytes(head[:_LENGTH_BYTES], "little"), head[_LENGTH_BYTES:]
        else:
            length = len(content)
        fits = INLINE_BYTES - _LENGTH_BYTES
        if length > fits:
            rest = torch.zeros(length - fits, dtype=torch.uint8)
            if self._tp.rank == 0:
                _fill(rest, content[fits:])
            dist.broadcast(rest, group=self._group, group_src=0)
            if self._tp.rank > 0:
                content += rest.numpy().tobytes()
        return word if self._tp.rank == 0 else pickle.loads(content[:length])

    def close(self) -> None:
        """Give back what was made for it; every rank calls this."""
        if self._own and self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self._own = None, False


def _fill(buffer: torch.Tensor, content: bytes) -> None:
    buffer[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
