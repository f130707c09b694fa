"""The run of a benchmark: which cases, what is printed, what is written, what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from benchmark_samples import toy

from benchmarks import (
    environment,
    kernel_profile,
    peers,
    report,
    runner,
)
from benchmarks.case import Case, Workload
from benchmarks.ceilings import H200
from benchmarks.checking import Error
from benchmarks.report import Row
from benchmarks.timing import Samples

ROOT = Path(__file__).resolve().parents[2]


def options(*argv: str, cases: list[Case]) -> argparse.Namespace:
    return runner.parser("toy", "A toy.", cases, samples=4).parse_args(argv)


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


@pytest.mark.gpu
@torch.no_grad()
def test_profile_on_a_gpu() -> None:
    x = torch.randn(512, 512, device="cuda")
    found, others = kernel_profile.launches(lambda: (x @ x).exp())
    assert [launch.operator for launch in found] == ["aten::mm", "aten::exp"]
    assert [launch.bytes for launch in found] == [3 * x.nbytes - x.nbytes, 2 * x.nbytes]
    assert all(launch.microseconds > 0 for launch in found)
    assert abs(others) < 1.0
