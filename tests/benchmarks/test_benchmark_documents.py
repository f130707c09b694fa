"""Tables and plots of recorded results, and the documents that quote them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from benchmark_samples import toy

from benchmarks import (
    environment,
    plot,
    plot_whole,
    recorded,
    report,
    table,
)
from benchmarks.ceilings import H200
from benchmarks.checking import Error
from benchmarks.report import Row
from benchmarks.timing import Samples

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_plot_of_a_whole_model(tmp_path: Path) -> None:
    Figure = pytest.importorskip("matplotlib.figure").Figure
    rows = [
        Row.of(
            toy(
                f"{over} {size}, {gpus}, {form}",
                sizes={over: size, "GPUs": gpus, "form": form},
                work=(size, "tokens"),
            ),
            H200,
            samples=Samples((size * 1e-3 / gpus,)),
        )
        for gpus in (1, 2)
        for over, size in (("batch", 2), ("batch", 4), ("length", 8), ("length", 16))
        for form in ("as generate", "replay")
    ]
    described = environment.describe(torch.device("cpu"))
    report.write_json(tmp_path / "whole.json", "whole", described, H200, 3, rows)
    results = recorded.read([tmp_path / "whole.json"])
    figure = Figure()
    assert plot_whole.draw_whole(figure, results) == results
    share, rate = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in share.lines}
    assert drawn["one GPU"] == [[2, 50], [4, 25]]
    assert drawn["two GPUs, replay"] == [[2, 100], [4, 50]]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in rate.lines}
    assert drawn["one GPU"] == [[8, 1000], [16, 1000]]
    assert drawn["two GPUs"] == [[8, 2000], [16, 2000]]
    assert [text.get_text() for text in rate.texts] == ["2.00 times one"] * 2
    assert plot.draw_batch(Figure(), results) == []
    assert plot_whole.draw_whole(Figure(), []) == []


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
