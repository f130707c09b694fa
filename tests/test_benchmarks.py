"""The benchmarks without a GPU: what they build and check, what they refuse to time, what they write and draw.

Sizes are tiny and run the kernels' CPU path; what needs a GPU's clock is marked so.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load_benchmarks() -> ModuleType:
    """The package benchmarks/, which is not installed, without the checkout on the import path."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
    return package


load_benchmarks()

# ruff: noqa: E402
import tp_mamba.mixer
import tp_mamba.model
from benchmarks import __main__ as listing
from benchmarks import (
    ceilings,
    chain,
    checking,
    conv,
    cpu,
    decode,
    environment,
    gemm,
    kernel_profile,
    layer,
    limits,
    long,
    norm,
    peers,
    plot,
    recorded,
    report,
    runner,
    scan,
    state_update,
    table,
    timing,
)
from benchmarks.case import Case, Workload
from benchmarks.ceilings import H200, Ceilings
from benchmarks.checking import Error
from benchmarks.report import Row
from benchmarks.timing import Samples
from tp_mamba.config import MambaConfig

TINY = MambaConfig(
    model_type="falcon_mamba",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    state_size=4,
    conv_kernel=4,
    time_step_rank=3,
    vocab_size=61,
    tie_word_embeddings=False,
    mixer_norm="weightless",
)
TINY_TIED = dataclasses.replace(TINY, model_type="mamba", mixer_norm="none", tie_word_embeddings=True)

# What is built, and the function whose result goes wrong to see that the check would notice.
WORKLOADS: dict[str, tuple[Callable[..., Workload], Any, str]] = {
    "scan, full": (
        partial(scan.build, sequences=3, length=9, channels=10, form="full", states=4),
        scan,
        "selective_scan_fn",
    ),
    "scan, mixer": (
        partial(scan.build, sequences=1, length=30, channels=10, form="mixer", states=4),
        scan,
        "selective_scan_fn",
    ),
    "conv": (partial(conv.build_forward, sequences=3, length=9, channels=10), conv, "causal_conv1d_fn"),
    "conv update": (partial(conv.build_update, batch=5, channels=10, copies=3), conv, "causal_conv1d_update"),
    "state update, full": (
        partial(state_update.build, batch=5, channels=10, form="full", states=4, copies=3),
        state_update,
        "selective_state_update",
    ),
    "state update, mixer": (
        partial(state_update.build, batch=1, channels=10, form="mixer", states=4, copies=2),
        state_update,
        "selective_state_update",
    ),
    "add and norm": (partial(norm.build_add, tokens=7, hidden=24, copies=2), norm, "add_rms_norm"),
    "split and norms": (partial(norm.build_split, tokens=7, rank=6, states=4, copies=2), norm, "split_dt_bc"),
    "dt_proj and softplus": (
        partial(gemm.build_linear_softplus, tokens=7, channels=20, rank=8, copies=2),
        gemm,
        "linear_softplus",
    ),
    "wide product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=True, copies=2),
        gemm,
        "_wide_product",
    ),
    "our wide product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=True, ours=True, copies=2),
        gemm,
        "skinny_linear",
    ),
    "our product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=False, ours=True, copies=2),
        gemm,
        "skinny_linear",
    ),
    "product": (
        partial(gemm.build_product, batch=3, rows=20, columns=32, wide=False, copies=2),
        gemm,
        "_product",
    ),
    "layer": (
        partial(layer.build, sequences=3, length=15, channels=160, hidden=96, rank=6),
        tp_mamba.mixer.MambaMixer,
        "forward",
    ),
    "decode": (
        partial(decode.build, batch=17, channels=160, hidden=96, rank=6, states=4, layers=3),
        tp_mamba.mixer.MambaMixer,
        "forward",
    ),
    "long, kernels": (
        partial(long.build_kernels, tokens=40, channels=10, checked=4, states=4),
        long,
        "causal_conv1d_fn",
    ),
    "long, layer": (
        partial(long.build_layer, tokens=70, channels=160, chunk=32, prefix=16, hidden=96, rank=6),
        tp_mamba.mixer.MambaMixer,
        "forward",
    ),
    "long, memory": (
        partial(long.build_memory, config=TINY, chunk=16, short=40, long=100),
        tp_mamba.model.MambaForCausalLM,
        "forward_packed",
    ),
    "cpu prefill": (
        partial(cpu.build_prefill, tokens=20, config=TINY_TIED),
        tp_mamba.model.MambaForCausalLM,
        "forward",
    ),
    "cpu decode": (
        partial(cpu.build_decode, prompt=6, new=5, config=TINY_TIED),
        tp_mamba.model.MambaForCausalLM,
        "forward_packed",
    ),
}


@torch.no_grad()
def built(name: str) -> Workload:
    return WORKLOADS[name][0](torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", WORKLOADS)
@torch.no_grad()
def test_check_passes_what_is_right(name: str) -> None:
    errors = built(name).check()
    assert errors
    assert all(error.ok for error in errors), [error.complaint() for error in errors]


@pytest.mark.parametrize("name", WORKLOADS)
@torch.no_grad()
def test_check_sees_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, owner, function = WORKLOADS[name]
    right = getattr(owner, function)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if name == "cpu decode":  # only which logit is the largest matters
            first.copy_(first.roll(1, -1))
        else:
            first[..., -1] *= 1.5
        return result

    monkeypatch.setattr(owner, function, wrong)
    assert not all(error.ok for error in built(name).check())


@torch.no_grad()
def test_a_long_layer_is_checked_to_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = tp_mamba.mixer.MambaMixer
    right = mixer.forward

    def wrong(self: Any, h_TH: torch.Tensor, *args: Any) -> torch.Tensor:
        out_TH = right(self, h_TH, *args)
        if h_TH.shape[0] == 70:  # the one call over all tokens
            out_TH[69] *= 1.5
        return out_TH

    monkeypatch.setattr(mixer, "forward", wrong)
    assert [error.output for error in built("long, layer").check() if not error.ok] == [
        "all tokens, in chunks"
    ]


@pytest.mark.parametrize("module", [scan, conv, state_update, norm, gemm, layer, decode, long, cpu])
def test_cases_are_well_formed(module: ModuleType) -> None:
    names = [case.name for case in module.CASES]
    assert len(names) == len(set(names))
    for case in module.CASES:
        assert case.limit is None or case.limit(H200) > 0
        goals = [goal for goal in (case.target.stretch, case.target.must) if goal is not None]
        assert goals == sorted(goals)
        if case.limit is not None and case.target.must is not None:
            assert case.target.must > case.limit(H200) * {"ms": 1e3, "us": 1e6}[case.unit]


def test_scan_is_checked_on_channels_from_end_to_end() -> None:
    cpu_device = torch.device("cpu")
    assert scan.checked_channels(8192, 8192, 16, cpu_device).tolist() == list(range(8192))
    some = scan.checked_channels(1 << 20, 8192, 16, cpu_device)
    assert len(some) == 128
    assert (some[0], some[-1]) == (0, 8191)


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


def test_samples() -> None:
    samples = Samples((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (samples.median, samples.least, samples.p90) == (3.0, 1.0, 5.0)
    assert Samples(tuple(map(float, range(1, 101)))).p90 == 90
    assert samples.scaled(1e3).values == (5e3, 1e3, 2e3, 4e3, 3e3)


def test_host_time_leaves_the_first_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs = [0.0], iter([100.0, 1.0, 2.0, 3.0])

    def call() -> None:
        now[0] += next(costs)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.on_host(call, 3).values == (1.0, 2.0, 3.0)


def test_a_chain_is_longer_than_the_cache() -> None:
    for count in (1_000_000, 3_000_000, 10**9):
        assert chain.links(count) * count >= chain.TRAFFIC
    assert chain.links(10**9) == chain.LEAST
    assert chain.links(1) == chain.MOST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compare_allows_rounding_and_no_more(dtype: torch.dtype) -> None:
    exact = torch.randn(50, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = exact.to(dtype)
    assert checking.compare("x", rounded, exact).ok
    one_element = rounded.clone()
    one_element[3, 4] += 0.1
    swapped = rounded.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    off = (exact * (1 + 4 * torch.finfo(dtype).eps + 1e-4)).to(dtype)
    holed = rounded.clone()
    holed[0, 0] = float("nan")
    for wrong in (one_element, swapped, off, holed, rounded * float("inf")):
        assert not checking.compare("x", wrong, exact).ok
    with pytest.raises(ValueError, match=r"x has shape \[40, 50\] but its reference has \[50, 40\]"):
        checking.compare("x", rounded.t(), exact)


def test_compare_with_a_reference_of_the_same_dtype() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = 1e-3 * torch.randn(1000, generator=torch.Generator().manual_seed(2))
    reference = exact.float() + noise
    assert checking.compare("x", exact.float() + 1.5 * noise.flip(0), exact, rounded=reference).ok
    assert not checking.compare("x", exact.float() + 3 * noise.flip(0), exact, rounded=reference).ok


def test_the_worst_error_of_each_output_is_told() -> None:
    small, large = Error("out", 1.0, 3.0, 0.0, 1.0), Error("out", 2.0, 3.0, 0.0, 1.0)
    wrong, nothing = Error("out", 0.5, 3.0, 9.0, 1.0), Error("out", math.nan, 3.0, 0.0, 1.0)
    other = Error("state", 0.0, 1.0, 0.0, 1.0)
    assert set(checking.worst_of_each([large, other, small])) == {large, other}
    assert checking.worst_of_each([wrong, large]) == [wrong]
    assert checking.worst_of_each([nothing, large, small]) == [nothing]


def options(*argv: str, cases: list[Case]) -> argparse.Namespace:
    return runner.parser("toy", "A toy.", cases, samples=4).parse_args(argv)


def toy(
    name: str,
    *,
    error: float = 0.0,
    measure: Callable[[int], Samples] | None = None,
    own_limit: float | None = None,
    **fields: Any,
) -> Case:
    """A case of one output, off by ``error``, whose samples are 2, 3, 4, .. ms."""

    def build(generator: torch.Generator) -> Workload:
        exact = torch.randn(100, generator=generator, dtype=torch.float64)
        return Workload(
            check=lambda: [checking.compare("out", (exact * (1 + error)).float(), exact)],
            measure=measure or (lambda samples: Samples(tuple(1e-3 * (i + 2) for i in range(samples)))),
            limit=own_limit,
        )

    defaults = {
        "unit": "ms",
        "sizes": {"batch": 1, "D": 8},
        "limit": limits.by_bytes(1e-3 * H200.bandwidth),
        "target": peers.Target(must=3.5, stretch=3.0, peers={"vLLM": 7.0}),
        "work": (7, "tokens"),
    }
    return Case(name=name, build=build, **{**defaults, **fields})


def run_toys(cases: list[Case], *argv: str) -> int:
    return runner.run("toy", cases, options(*argv, cases=cases), torch.device("cpu"))


def test_run_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "toy.json"
    assert run_toys([toy("first", own_limit=1e-3), toy("second")], "--seed", "11", "--json", str(path)) == 0
    out, err = capsys.readouterr()
    assert "seed 11" in out
    header, *lines = out.splitlines()[1:]
    assert header.split() == (
        [
            "case",
            "median",
            "min",
            "p90",
            "limit",
            "of",
            "limit",
            "must",
            "stretch",
            "vs",
            "vLLM",
            "rate",
            "error",
        ]
    )
    assert len(lines) == 2
    assert "3.50 ms" in lines[0]
    assert "29%" in lines[0]
    assert "3.50 met" in lines[0]
    assert "3.00 missed" in lines[0]
    assert "2.00x" in lines[0]
    assert "2,000 tokens/s" in lines[0]
    assert "out " in lines[0]
    assert err.count("first: 3.50 ms") == 1

    content = json.loads(path.read_text())
    assert content["benchmark"] == "toy"
    assert content["seed"] == 11
    assert content["environment"]["torch"] == torch.__version__
    first = content["rows"][0]
    assert first["statistics"] == pytest.approx({"median": 3.5, "min": 2.0, "p90": 5.0, "count": 4})
    assert first["share_of_limit"] == pytest.approx(1 / 3.5)
    assert first["times_faster_than"] == pytest.approx({"vLLM": 2.0})
    assert first["rate"] == pytest.approx(2000)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [
        Row.of(
            toy("right"), H200, samples=Samples((0.25, 0.5)), errors=[Error("out", 1e-3, 2e-3, 1e-2, 2e-2)]
        ),
        Row.of(toy("bare", limit=None, target=peers.Target(), work=None), samples=Samples((0.125,))),
        Row.of(toy("wrong"), errors=[Error("out", 1e-1, 2e-3, 1e-2, 2e-2)]),
        Row.of(toy("own limit"), H200, samples=Samples((0.5,)), limit=0.125),
        Row.of(toy("no GPU"), samples=Samples((0.5,))),
    ]
    path = tmp_path / "rows.json"
    report.write_json(path, "toy", environment.describe(torch.device("cpu")), H200, 3, rows)
    benchmark, described, again = report.read_json(path)
    assert (benchmark, again) == ("toy", rows)
    assert described["threads"] == torch.get_num_threads()
    assert [row.limit for row in again] == pytest.approx([1.0, None, None, 125.0, None])  # ms
    assert again[3].share == 0.25
    assert json.loads(path.read_text())["ceilings"]["bandwidth"] == H200.bandwidth


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{}]}', '{"rows": 3}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is no result of these benchmarks .* --json wrote"):
        report.read_json(path)


def test_no_time_for_a_wrong_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(samples: int) -> Samples:
        pytest.fail("timed although its output is wrong")

    path = tmp_path / "toy.json"
    cases = [toy("wrong", error=0.01, measure=measure), toy("right")]
    assert run_toys(cases, "--json", str(path)) == 1
    out, _ = capsys.readouterr()
    (line,) = (line for line in out.splitlines() if line.startswith("wrong"))
    assert "FAILED" in line
    assert "out is off by 1.00e-02 in the norm" in line
    assert " ms" not in line
    wrong, right = json.loads(path.read_text())["rows"]
    assert wrong["samples"] == []
    assert wrong["statistics"] is None
    assert right["samples"]
    with pytest.raises(ValueError, match="a wrong output has no time"):
        Row.of(cases[0], samples=Samples((1.0,)), errors=[Error("out", math.nan, 1.0, 0.0, 1.0)])


def test_a_case_that_raises_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(samples: int) -> Samples:
        raise RuntimeError("out of [memory]\nat great length")

    assert run_toys([toy("first", measure=measure), toy("second")]) == 1
    out, err = capsys.readouterr()
    assert "RuntimeError: out of [memory]" in out
    assert "at great length" not in out
    assert "second: 3.50 ms" in err


def test_a_case_has_the_same_inputs_whichever_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    drawn: list[int] = []

    def build(generator: torch.Generator) -> Workload:
        drawn.append(int(torch.randint(1 << 30, (1,), generator=generator)))
        return Workload(check=list, measure=lambda samples: Samples((1.0,)))

    cases = [dataclasses.replace(toy(name), build=build) for name in ("a", "b")]
    run_toys(cases, "--seed", "1")
    run_toys(cases, "--seed", "1", "--cases", "b")
    run_toys(cases, "--seed", "2", "--cases", "b")
    assert drawn[1] == drawn[2]
    assert len(set(drawn)) == 3
    run_toys(cases, "--cases", "b")
    run_toys(cases, "--cases", "b")
    assert len(set(drawn)) == 5


def test_cases_that_fit_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_toys([toy("first")], "--cases", "last") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--cases 'last' is in no name of a case, such as 'first'" in err
    assert "python -m benchmarks.toy --help" in err


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(generator: torch.Generator) -> Workload:
        pytest.fail("built although its results have no place")

    case = dataclasses.replace(toy("first"), build=build)
    assert run_toys([case], "--json", str(tmp_path)) == 2
    assert f"--json {tmp_path} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_samples_are_positive(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options("--samples", number, cases=[toy("first")])
    assert f"--samples: '{number}' is no positive number: give 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(0.0321, "0.032"), (0.32, "0.320"), (4.216, "4.22"), (35.42, "35.4"), (143.6, "144")]
)
def test_figures(value: float, text: str) -> None:
    assert report.figures(value) == text


def test_commit_is_gits_or_the_given_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert environment.source("abc") == {"commit": "abc", "dirty": None}
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.source() == {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert environment.source() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    result = tmp_path / "benchmarks" / "results" / "scan.json"
    result.parent.mkdir(parents=True)
    result.touch()
    assert environment.source()["dirty"] is False
    (tmp_path / "new").touch()
    assert environment.source()["dirty"] is True


def test_bytes_of_operators() -> None:
    a, b, out = torch.zeros(3, 4), torch.zeros(4, 5, dtype=torch.float64), torch.zeros(2, 3)
    with kernel_profile.Traffic() as traffic:
        torch.mm(a, b[:, :2].float())
        torch.add(out, out, out=out)
    assert ("aten::mm", 4 * (12 + 8 + 6)) in traffic.seen
    assert ("aten::add", 24) in traffic.seen  # in, in and out are one tensor


def test_kernels_and_bytes_join_by_name_and_order() -> None:
    timed = [("aten::mm", ("k1",), 2.0), ("tp::scan", ("k2", "k3"), 4.0), ("aten::mm", ("k1",), 3.0)]
    seen = [("aten::t", 5), ("aten::mm", 10), ("aten::mm", 30)]
    found = kernel_profile.join(timed, seen)
    assert [launch.bytes for launch in found] == [10, None, 30]
    columns = kernel_profile.as_table(found, 7.0).columns
    assert list(columns[0].cells) == ["aten::mm", "tp::scan", "aten::mm", "no operator", "total"]
    assert list(columns[1].cells)[-1] == "4 kernels"
    assert list(columns[2].cells)[-1] == "16.0"


def record(path: Path, *rows: tuple[str, dict[str, int | str], float], date: str = "2020-01-02") -> Path:
    """A file of results, of cases with these sizes and milliseconds, and of one that failed."""
    measured = [
        Row.of(
            toy(name, sizes=sizes),
            H200,
            samples=Samples((time * 1e-3,)),
            errors=[Error("state", 2e-7, 1.0, 0.0, 1.0), Error("out", 3e-3, 1.0, 0.0, 1.0)],
        )
        for name, sizes, time in rows
    ]
    measured.append(Row.of(toy("wrong"), failure="wrong"))
    described = environment.describe(torch.device("cpu"), "0123456789abcdef") | {
        "date": f"{date}T00:00:00+00:00"
    }
    report.write_json(path, "toy", described, H200, 3, measured)
    return path


def test_of_a_case_the_newest_result_counts(tmp_path: Path) -> None:
    sizes: dict[str, int | str] = {"batch": 1, "D": 8}
    new = record(tmp_path / "a.json", ("twice", sizes, 1.0), date="2020-03-01")
    old = record(tmp_path / "b.json", ("twice", sizes, 9.0), ("once", sizes, 5.0), date="2020-02-01")
    for files in ([new, old], [old, new]):
        found = recorded.read(files)
        assert {result.row.case: result.row.median for result in found} == {"twice": 1.0, "once": 5.0}
    where = recorded.source(found)
    assert where.count(environment.processor()) == 1
    assert "2020-02-01 (commit 0123456789ab), 2020-03-01 (commit 0123456789ab)" in where


def test_benchmarks_are_shown_in_one_order(tmp_path: Path) -> None:
    described = environment.describe(torch.device("cpu"))
    rows = [Row.of(toy("case"), samples=Samples((1e-3,)))]
    for name in ("other", "decode", "scan"):
        report.write_json(tmp_path / f"{name}.json", name, described, None, 3, rows)
    found = recorded.read(sorted(tmp_path.glob("*.json")))
    assert [result.title for result in found] == ["selective scan", "mixer layer, decode", "other"]


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = record(
        tmp_path / "toy.json",
        ("short", {"sequences": 1, "length": 512, "D": 8}, 2.0),
        ("long", {"sequences": 1, "length": 2048, "D": 8}, 4.0),
        ("one", {"batch": 1, "D": 8}, 2.0),
        ("many", {"batch": 64, "D": 8}, 4.0),
    )
    assert plot.main([str(path), "--out", str(tmp_path / "plots")]) == 0
    written = [Path(name) for name in capsys.readouterr().out.split()]
    assert [name.name for name in written] == ["share.png", "length.png", "batch.png"]
    for name in written:
        assert name.read_bytes().startswith(b"\x89PNG")
        assert name.stat().st_size < 100_000


def test_what_plots_show(tmp_path: Path) -> None:
    Figure = pytest.importorskip("matplotlib.figure").Figure
    path = record(
        tmp_path / "toy.json",
        ("many, plain", {"batch": 64, "D": 8, "form": "plain"}, 4.0),
        ("one, plain", {"batch": 1, "D": 8, "form": "plain"}, 2.0),
        ("one, fast", {"batch": 1, "D": 8, "form": "fast"}, 1.0),
        ("elsewhere", {"batch": 1, "D": 16, "form": "plain"}, 1.0),
    )
    results = recorded.read([path])

    bars = Figure()
    assert plot.draw_share(bars, results) == results
    (axes,) = bars.axes
    assert [patch.get_width() for patch in axes.patches] == [25.0, 50.0, 100.0, 100.0]
    shown = [line.get_xdata()[0] for line in axes.lines]
    assert shown.count(pytest.approx(100 / 3.5)) == 4  # the goal, beside each bar
    assert shown.count(pytest.approx(100 / 7)) == 4  # vLLM
    assert {"4.00 ms", "toy"} <= {text.get_text() for text in axes.texts}

    lines = Figure()
    assert {result.row.case for result in plot.draw_batch(lines, results)} == {
        "many, plain",
        "one, plain",
        "one, fast",
    }
    (axes,) = lines.axes  # no panel for the lone D 16
    assert axes.get_ylabel() == "ms"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "ours, plain": [[1, 2], [64, 4]],
        "ours, fast": [[1, 1]],
        "goal": [[1, 3.5], [64, 3.5]],
        "limit": [[1, 1], [64, 1]],
        "vLLM": [[1, 7], [64, 7]],
    }
    assert plot.draw_length(Figure(), results) == []


def test_a_place_without_a_panel_stays_empty(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    rows: list[tuple[str, dict[str, int | str], float]] = [
        (f"{batch} of {channels}", {"batch": batch, "D": channels}, 1.0)
        for batch in (1, 2)
        for channels in (8, 16, 32)
    ]
    assert plot.draw_batch(figure, recorded.read([record(tmp_path / "toy.json", *rows)]))
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]


def test_table_of_recorded_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, int | str] = {"batch": 1, "D": 8}
    path = record(tmp_path / "toy.json", ("fast", sizes, 3.5), ("slow", sizes, 14.0))
    assert table.main([str(path)]) == 0
    head, rule, fast, slow, blank, where = capsys.readouterr().out.splitlines()
    assert fast == "| toy: fast | 3.50 ms | 1.00 | 29% | vLLM 2.00 | out 3.0e-03 |"
    assert slow == "| toy: slow | 14.0 ms | 1.00 | 7% | vLLM 0.500 | out 3.0e-03 |"
    assert head.count("|") == rule.count("|") == fast.count("|")
    assert not blank
    assert environment.processor() in where
    assert table.main([str(path), "--cases", "slow"]) == 0
    assert fast not in capsys.readouterr().out
    assert table.main([str(path), "--cases", "none"]) == 2
    assert "no case with a time has 'none'" in capsys.readouterr().err
    assert table.main([str(tmp_path / "none.json")]) == 2
    assert "none.json is no result" in capsys.readouterr().err


PAGES = [
    "README.md",
    *(f"docs/kernels/{page.name}" for page in sorted((ROOT / "docs" / "kernels").glob("*.md"))),
]
OPERATORS = ("causal_conv1d", "layer", "rms_norm", "selective_scan", "selective_state_update")
QUOTING = {"README.md", *(f"docs/kernels/{op}.md" for op in OPERATORS)}


@pytest.mark.parametrize("name", PAGES)
def test_documents_quote_what_was_recorded(name: str) -> None:
    files = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    known = set(table.lines(recorded.read(files)))
    prefixes = tuple(f"| {benchmark}: " for benchmark in recorded.TITLES)
    quoted = [line for line in (ROOT / name).read_text().splitlines() if line.startswith(prefixes)]
    assert quoted or name not in QUOTING
    assert [line for line in quoted if line not in known] == []


def test_plot_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    path = record(tmp_path / "toy.json", ("one", {"batch": 1}, 1.0))
    assert plot.main([str(path), "--out", str(tmp_path)]) == 2
    assert 'pip install -e ".[bench]"' in capsys.readouterr().err
    assert plot.main([str(tmp_path / "none.json")]) == 2
    assert "none.json is no result" in capsys.readouterr().err


def test_plots_need_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = record(tmp_path / "toy.json", ("one", {"batch": 1}, 1.0))
    assert plot.main([str(path), "--out", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--out {path} cannot be written" in err


def test_every_benchmark_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in listing.NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.split(maxsplit=1)[1] == (module.__doc__ or "").splitlines()[0]
    runnable = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert runnable - {"__main__", "__init__"} == set(listing.NAMES)


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["scna"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "'scna' is no benchmark" in err
    assert "scan" in err


def from_root(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python at the root of the repository, as a user starts it."""
    import os

    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "command"), [("scan", ["benchmarks.scan"]), ("layer", ["benchmarks", "layer"])]
)
def test_without_a_gpu(name: str, command: list[str]) -> None:
    done = from_root("-m", *command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"python -m benchmarks.{name} needs an NVIDIA GPU" in done.stderr


def test_the_root_is_off_the_path() -> None:
    code = (
        "import benchmarks.__main__; from importlib.util import find_spec; "
        "print(find_spec('kernels'), find_spec('tp_mamba').origin)"
    )
    kernels, _, package = from_root("-c", code).stdout.strip().rpartition(" ")
    assert str(ROOT) not in kernels
    assert package.endswith("__init__.py")


@pytest.mark.gpu
def test_device_times() -> None:
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 8192))
    for clock in (timing.flushed, timing.replayed):
        short, lengthy = (clock(partial(torch.mm, x, x), 5) for x in (small, large))
        assert len(short.values) == 5
        assert 0 < short.median < lengthy.least


@pytest.mark.gpu
def test_a_slow_host_does_not_show() -> None:
    x = torch.randn(256, 256, device="cuda")

    def run() -> None:
        torch.mm(x, x)
        time.sleep(3e-3)
        torch.mm(x, x)

    assert timing.flushed(run, 5).median < 1e-3


@pytest.mark.gpu
def test_a_chain_is_replayed() -> None:
    x = torch.ones(4, device="cuda")
    links = chain.Chain([lambda: x * 2, lambda: x + 1], torch.device("cuda"))
    first, second = links.outputs
    x.fill_(5)
    links()
    assert links.outputs[0] is first
    assert first.tolist() == [10.0] * 4
    assert second.tolist() == [6.0] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in WORKLOADS if not name.startswith("cpu")])
@torch.no_grad()
def test_check_and_time_on_a_gpu(name: str) -> None:
    workload = WORKLOADS[name][0](torch.Generator("cuda").manual_seed(5))
    errors = workload.check()
    assert all(error.ok for error in errors), [error.complaint() for error in errors]
    assert workload.measure(3).least > 0


@pytest.mark.gpu
@torch.no_grad()
def test_profile_on_a_gpu() -> None:
    x = torch.randn(512, 512, device="cuda")
    found, others = kernel_profile.launches(lambda: (x @ x).exp())
    assert [launch.operator for launch in found] == ["aten::mm", "aten::exp"]
    assert [launch.bytes for launch in found] == [3 * x.nbytes - x.nbytes, 2 * x.nbytes]
    assert all(launch.microseconds > 0 for launch in found)
    assert abs(others) < 1.0
