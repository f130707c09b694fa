"""Limits that the benchmarks hold times against: bytes, operations, the GPU's ceilings."""

from __future__ import annotations

import pytest
import torch

from benchmarks import (
    ceilings,
    decode,
    environment,
    gemm,
    limits,
    runner,
    state_update,
)
from benchmarks.ceilings import H200, Ceilings


# The limits that the tables give, to their last digit.
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (limits.by_exponentials(8192, 8192, 16), 0.32e-3),
        (limits.by_exponentials(2048, 4096, 16), 0.04e-3),
        (limits.by_exponentials(32768, 4096, 16), 0.64e-3),
        *(
            (limits.by_bytes_of_a_step(decode.moved_bytes(batch, channels)), expected)
            for (batch, channels), expected in {
                (1, 8192): 49.5e-6,
                (8, 8192): 51.4e-6,
                (32, 8192): 57.8e-6,
                (128, 8192): 83.6e-6,
                (256, 8192): 118e-6,
                (1, 4096): 24.8e-6,
                (256, 4096): 59.0e-6,
            }.items()
        ),
        (limits.by_bytes_of_a_step(state_update.moved_bytes(32, 8192, 16, "full")), 8.4e-6),
        (limits.by_bytes_of_a_step(state_update.moved_bytes(256, 8192, 16, "full")), 66.8e-6),
    ],
)
def test_limits_are_those_of_the_tables(limit: limits.Limit, expected: float) -> None:
    assert limit(H200) == pytest.approx(expected, rel=0.015)


def test_limits_follow_the_gpu() -> None:
    gpu = Ceilings(hardware="toy", bandwidth=10.0, step_bandwidth=5.0, products=2.0, exponentials=40.0)
    copied, multiplied = limits.by_bytes(30), limits.by_flops(4)
    assert (copied(gpu), limits.by_bytes_of_a_step(30)(gpu), multiplied(gpu)) == (3.0, 6.0, 2.0)
    assert limits.by_exponentials(5, 4, 12)(gpu) == 8.0
    assert limits.side_by_side(copied, multiplied)(gpu) == 3.0
    assert limits.in_turn(copied, multiplied)(gpu) == 5.0


@pytest.mark.gpu
def test_ceilings_of_this_gpu() -> None:
    """Measured twice alike, and no higher than 16 exponentials a clock and multiprocessor at 2 GHz (on Hopper)."""
    device = torch.device("cuda", torch.cuda.current_device())
    first, second = ceilings.measure(device), ceilings.measure(device)
    assert first.hardware == torch.cuda.get_device_name(device)
    for name in ("bandwidth", "products", "exponentials"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=0.15)
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) == (9, 0):
        highest = 16 * properties.multi_processor_count * 2.0e9
        assert 0.5 * highest < first.exponentials < highest
        assert 1e12 < first.bandwidth < 5e12
        assert 300e12 < first.products < 1000e12
    assert ceilings.ceilings_of(device).hardware == first.hardware


def test_the_headline_tells_whose_limits_and_goals_they_are() -> None:
    described = environment.describe(torch.device("cpu")) | {"threads": None}
    gpu = Ceilings(hardware="toy", bandwidth=3e12, step_bandwidth=3e12, products=5e14, exponentials=4e12)
    text = runner.headline("scan", described, 3, gpu)
    assert "limits of this GPU: copies 3.00 TB/s, products 500 TFLOP/s, exponentials 4.00 T/s" in text
    assert "Goals and recorded times are those of an NVIDIA H200" in text
    assert "Goals" not in runner.headline("scan", described, 3, H200)
    assert "limits" not in runner.headline("cpu", environment.describe(torch.device("cpu")), 3, None)


def test_share_of_bandwidth_is_that_of_the_table() -> None:
    (case,) = (case for case in gemm.CASES if case.name == "in_proj 16384 x 4096, batch 1, cuBLAS")
    assert case.limit is not None
    assert case.limit(H200) / 35.4e-6 == pytest.approx(0.88, abs=0.005)


def test_our_products_stand_beside_those_of_cublas() -> None:
    cases = {case.name: case for case in gemm.CASES}
    ours = [name for name in cases if name.endswith(", ours")]
    assert len(ours) == len(gemm.BATCHES) * 6  # three weights, whole and halved
    for name in ours:
        beside = cases[name.removesuffix("ours") + "cuBLAS"]
        assert cases[name].limit is not None
        assert beside.limit is not None
        assert (cases[name].limit(H200), cases[name].target) == (beside.limit(H200), beside.target)
        assert cases[name].sizes != beside.sizes


def test_bytes_moved_are_those_of_the_tensors() -> None:
    # Counted by formula for the limits; here from the tensors of a small case.
    x = state_update.StateSpace.random(torch.Generator().manual_seed(0), 5, 10, 4, "full")
    state = torch.empty(5, 10, 4)
    tensors = [x.u, x.z, x.delta, x.u, x.delta_bias, x.A, x.B, x.C, x.D, state, state]
    assert state_update.moved_bytes(5, 10, 4, "full") == limits.bytes_of(tensors)
    made = decode.make_layer(torch.Generator().manual_seed(0), 5, 24, 40, 3, 4)
    held = [*made.norm.parameters(), *made.mixer.parameters(), *made.state, *made.state]
    assert decode.moved_bytes(5, 40, 24, 3, 4) == limits.bytes_of(held)
