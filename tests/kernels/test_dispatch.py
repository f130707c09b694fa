"""Which implementation serves a tensor."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tp_mamba.kernels.common.dispatch import calls_directly, use_triton
from tp_mamba.kernels.common.remember import Key, key_of, remembered
from tp_mamba.kernels.rms_norm import add_rms_norm


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
    assert calls_directly(x, None, torch.nn.Parameter(x, requires_grad=False))
    with torch.no_grad():
        assert calls_directly(x, torch.nn.Parameter(x))
    assert not calls_directly(x, torch.nn.Parameter(x))  # autograd looks on
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


def test_whoever_is_to_see_an_op_sees_it() -> None:
    """In eager an op is called as a function; a dispatch mode, a tracer and subclasses of Tensor get the op itself."""
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    assert calls_directly(x, None, torch.nn.Parameter(residual, requires_grad=False))
    traced = make_fx(lambda x, r: add_rms_norm(x, r, None))(x, residual)
    assert "tp_mamba.add_rms_norm" in traced.code
    with FakeTensorMode() as mode:
        assert not calls_directly(x)
    assert not calls_directly(x, mode.from_tensor(residual))
    assert calls_directly(x)


def test_a_check_is_made_once_per_form_and_again_where_it_failed() -> None:
    made = []

    @remembered
    def check(key: Key) -> None:
        made.append(key)
        if key[1] == torch.int32:
            raise ValueError("no")

    for _ in range(2):
        check(key_of(torch.zeros(2)))
        with pytest.raises(ValueError, match="no"):
            check(key_of(torch.zeros(2, dtype=torch.int32)))
    assert len(made) == 3
