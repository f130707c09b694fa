"""Integer arithmetic of launches, against Triton's."""

from __future__ import annotations

import triton

from tp_mamba.kernels.common.integers import cdiv, next_power_of_2


def test_agrees_with_triton() -> None:
    for n in (*range(1, 70), 1023, 1024, 1025, 2**31 - 1, 2**31, 2**40 + 1):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        for b in (1, 3, 16, 8192):
            assert cdiv(n, b) == triton.cdiv(n, b)
    assert (cdiv(0, 8), next_power_of_2(0), next_power_of_2(-3)) == (0, 1, 1)
