"""When sums over the ranks are fused, and what happens where they cannot be; the sums themselves need GPUs."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace

import pytest
import torch

from tp_mamba.parallel import fused, symmetric
from tp_mamba.parallel.communicate import Communicator
from tp_mamba.parallel.fused import FusedCommunicator, is_wanted
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.partial import Partial

SEEN = symmetric.Seen("host", "a", ("b",), (), 132)


def test_the_environment_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fused.VARIABLE, raising=False)
    assert is_wanted()
    monkeypatch.setenv(fused.VARIABLE, "0")
    assert not is_wanted()
    monkeypatch.setenv(fused.VARIABLE, "no")
    with pytest.raises(ValueError, match="TP_MAMBA_FUSED_ALL_REDUCE is 'no': set it to 1"):
        is_wanted()


def test_why_ranks_do_not_share_memory() -> None:
    other = symmetric.Seen("host", "b", ("a",), (), 114)
    assert symmetric.reason_against([SEEN, other]) is None
    assert (
        symmetric.reason_against([SEEN] * 9)
        == "9 ranks are more than the 8 that may reach one another's memory"
    )
    assert (
        symmetric.reason_against([SEEN, replace(other, host="elsewhere")]) == "the ranks are on several hosts"
    )
    assert symmetric.reason_against([SEEN, replace(other, gpu="")]) == "rank 1 has no NVIDIA GPU"
    assert symmetric.reason_against([SEEN, SEEN]) == "several ranks share a GPU"
    hidden = replace(SEEN, reached=(), hidden=("b",))
    assert (
        symmetric.reason_against([hidden, other]) == "the GPU of rank 0 does not reach the memory of rank 1's"
    )
    # A rank that sees its own GPU alone cannot tell: it is tried.
    assert symmetric.reason_against([replace(SEEN, reached=()), other]) is None


def _on_gloo(tp: TensorParallel) -> tuple[str, object]:
    """What the default is on a CPU, and what a group of CPUs that asks for fused sums is told."""
    return type(tp.communicator).__name__, fused._opened(tp.process_group(), torch.device("cpu"))


def test_ranks_without_gpus_agree_on_the_plain_way(ranks) -> None:
    assert ranks(2).run(_on_gloo) == [("Communicator", (None, "rank 0 has no NVIDIA GPU"))] * 2


def _falls_back(tp: TensorParallel) -> tuple[list[str], bool]:
    """The warnings of two preparations, and whether sums, whole and in slices, are then the plain ones."""
    communicator = FusedCommunicator()
    own = TensorParallel(tp.group, device="cpu", communicator=communicator)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(fused, "_opened", lambda group, device: (None, "a test says so"))
        patch.setattr(fused, "_Order", lambda device: None)
        assert communicator.takes_slices(own), "until it is known otherwise"
        assert not communicator.prepare(own)
        assert not communicator.prepare(own)
    assert not communicator.takes_slices(own)
    value = torch.arange(24.0).view(3, 2, 4) * (tp.rank + 1)
    options = {"dt_weight": None, "b_weight": None, "c_weight": None, "eps": None, "dt_dtype": torch.float32}
    dt, B, C = Partial(value.clone(), own, sliced=True).split(2, 1, **options)
    plain = TensorParallel(tp.group, device="cpu", communicator=Communicator())
    same = torch.equal(torch.cat([dt, B, C], dim=1), Partial(value.sum(dim=0), plain).sum())
    return [str(warning.message) for warning in caught], same


def test_where_memory_cannot_be_shared_it_is_said_once(ranks) -> None:
    said = "sums over the ranks are left to NCCL, which is slower for small ones: a test says so"
    assert ranks(2).run(_falls_back) == [([said], True)] * 2


def test_a_capture_before_memory_is_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tp = TensorParallel.virtual(0, 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"run the step once before, or call tp.communicator.prepare\(tp\)"
    ):
        FusedCommunicator().prepare(tp)
    assert not FusedCommunicator().prepare(TensorParallel(device="cpu"))


class _Stream:
    """Stands in for a CUDA stream, and remembers whom it waited for."""

    current: _Stream

    def __init__(self, number: int, capturing: bool = False) -> None:
        self.cuda_stream, self.capturing, self.waited_for = number, capturing, []

    def wait_stream(self, other: _Stream) -> None:
        self.waited_for.append(other.cuda_stream)

    def __enter__(self) -> None:
        self.before, _Stream.current = _Stream.current, self

    def __exit__(self, *failure: object) -> None:
        _Stream.current = self.before


def test_a_sum_on_another_stream_is_behind_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: _Stream.current.capturing)
    a, b, capture, fork = _Stream(1), _Stream(2), _Stream(3, capturing=True), _Stream(4, capturing=True)
    order = fused._Order(torch.device("cpu"))
    for _Stream.current in (a, a, b, a, capture, fork, capture):
        order.enter()
    assert (a.waited_for, b.waited_for) == ([2], [1])
    assert (capture.waited_for, fork.waited_for) == ([4], [3]), (
        "within the graph, and no wait for what is not in it"
    )
    _Stream.current = b
    with pytest.raises(RuntimeError, match="let the capture end first"):
        order.enter()
    capture.capturing = False
    order.enter()
    assert b.waited_for == [1, 3]


def test_it_is_pickled_without_its_memory() -> None:
    communicator = FusedCommunicator()
    communicator._fused = False
    assert pickle.loads(pickle.dumps(communicator))._fused
