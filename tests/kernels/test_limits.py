"""Limits, dtypes and device properties that all operators share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tp_mamba.kernels.common import device
from tp_mamba.kernels.common.dtypes import DTYPES, wide_dtype
from tp_mamba.kernels.common.limits import check_activation, check_conv_width, check_state_size


class RefusedError(ValueError):
    pass


def test_what_is_served_passes() -> None:
    for n in (1, 16, 256):
        check_state_size("op: A", n)
    for width in (2, 3, 4):
        check_conv_width("op: weight", width)
    for activation in ("silu", "swish"):
        check_activation("op", activation)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_state_size, 0, "it has a state size N of 0 but N must be 1 to 256"),
        (check_state_size, 257, "it has a state size N of 257 but"),
        (check_conv_width, 1, "it has a convolution width K of 1 but K must be 2 to 4"),
        (check_conv_width, 5, "it has a convolution width K of 5 but"),
        (check_activation, "gelu", "it has the unknown activation 'gelu'"),
        (check_activation, None, "it has the unknown activation None"),
    ],
)
def test_what_is_not_served_is_refused(check: object, value: object, message: str) -> None:
    assert callable(check)
    with pytest.raises(RefusedError, match=message):
        check("it", value, RefusedError)


def test_wide_dtypes() -> None:
    assert {name: wide_dtype(dtype) for name, dtype in DTYPES.items()} == {
        "float32": torch.float32,
        "bfloat16": torch.float32,
        "float16": torch.float32,
        "float64": torch.float64,
    }


def test_properties_are_those_of_the_tensors_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two different GPUs is asked once."""
    asked: list[int] = []

    def properties(index: int) -> SimpleNamespace:
        asked.append(index)
        return SimpleNamespace(
            multi_processor_count=100 + index, shared_memory_per_multiprocessor=1024 * (1 + index)
        )

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    device._properties.cache_clear()
    try:
        for _ in range(2):
            found = [device.device_properties(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda")]
            assert [each.sm_count for each in found] == [100, 101, 101]
        assert asked == [0, 1]
        assert found[1].shared_bytes_per_sm == 2048
    finally:
        device._properties.cache_clear()
    assert device.device_properties(torch.device("cpu")) is device.INTERPRETED
