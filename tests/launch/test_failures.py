"""Which error is told, and in which words; no process is started."""

from __future__ import annotations

import pytest
from torch.distributed import DistBackendError

from tp_mamba.launch.ranks.failures import RankFailure, is_consequence, sentence_of
from tp_mamba.launch.ranks.start import first_of
from tp_mamba.parallel.group import RankFailedError


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "x"), "[Errno 2] No such file or directory: 'x'"),
        (RankFailedError("rank 1 of 2 failed: bad"), "rank 1 of 2 failed: bad"),
        (KeyError("layer"), "KeyError: 'layer'"),
        (RuntimeError("prompt 1: the logits are not finite"), "prompt 1: the logits are not finite"),
        (NotImplementedError("for this dtype"), "NotImplementedError: for this dtype"),
        (
            RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"),
            "rank 5 lost contact with another rank, which ended before its work was done; see that rank's error",
        ),
        (
            DistBackendError("NCCL error: unhandled system error"),
            "DistBackendError: NCCL error: unhandled system error",
        ),
        (
            DistBackendError("ncclRemoteError: A call failed"),
            "rank 5 lost contact with another rank, which ended before its work was done; see that rank's error",
        ),
        (ValueError(), "ValueError"),
        (SystemExit(3), "rank 5 exited with status 3 before its work was done"),
    ],
)
def test_sentence(error: BaseException, sentence: str) -> None:
    assert sentence_of(error, 5) == sentence


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (RankFailedError("rank 1 of 2 failed"), True),
        (DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"), True),
        (RuntimeError("[/src/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_consequences_are_told_from_causes(error: BaseException, consequence: bool) -> None:
    assert is_consequence(error) is consequence


def test_the_first_failure_is_a_cause_then_the_earliest() -> None:
    errors = [
        RuntimeError("gloo/transport: Connection closed by peer"),
        ValueError("the cause"),
        ValueError("a later error"),
    ]
    failures = [RankFailure.of(error, rank) for rank, error in enumerate(errors)]
    assert first_of(failures[::-1]).sentence == "the cause"
    killed = RankFailure.of_exit(3, -9)
    assert first_of([*failures, killed]) is killed
    assert killed.sentence == "rank 3 was killed by SIGKILL; the other ranks have been ended"
