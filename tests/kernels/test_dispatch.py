"""Which implementation serves a tensor."""

import pytest
import torch

from tp_mamba.kernels.common.dispatch import calls_directly, use_triton


def test_triton_serves_a_gpu_and_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not use_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(1))
    assert use_triton(torch.zeros(1, dtype=torch.bfloat16))


def test_float64_never_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute in float32, wherever they run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not use_triton(torch.zeros(1, dtype=torch.float64))


def test_an_op_is_called_directly_where_nobody_looks_on() -> None:
    x = torch.zeros(2)
    assert calls_directly(x, None, torch.nn.Parameter(x))
    assert not calls_directly(x.to("meta"))  # only the registered op knows shapes without values
    assert not calls_directly(x, torch.nn.Buffer(x).as_subclass(type("Marked", (torch.Tensor,), {})))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert use_triton(torch.zeros(1, device="cuda"))
    assert not use_triton(torch.zeros(1, device="cuda", dtype=torch.float64))


def test_a_tensor_without_data_goes_through_the_op() -> None:
    assert calls_directly(torch.ones(1), None)
    assert not calls_directly(torch.ones(1, device="meta"), None)
