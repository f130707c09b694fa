"""The trace of requests, on a CPU and small: what it counts, and what it sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import recorded, trace
from benchmarks.served import Served
from benchmarks.trace import make_trace, summarize

SMALL = [
    "--model",
    "tiny",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--requests",
    "3",
    "--prompt-tokens",
    "3",
    "9",
]
SMALL += ["--new-tokens", "3", "--max-batch-size", "2", "--warm-ups", "1", "--check", "2", "--rates"]


def test_a_run_serves_all_and_keeps_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main([*SMALL, "0", "40", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert "6 of 6 tokens as alone" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [result["case"] for result in found["results"]] == ["all at once", "40 requests/s"]
    for result in found["results"]:
        assert (result["requests"], result["new_tokens"]) == (3, 9)
        assert result["tokens_per_second"] == pytest.approx(9 / result["seconds"])
        kinds = {kind["kind"]: kind for kind in result["steps"]}
        assert kinds.keys() == {"prompts", "decode"}
        assert sum(kind["tokens"] for kind in kinds.values()) == sum(found["prompt_lengths"]) + 3 * 2
        assert sum(kind["forward"] + kind["between"] for kind in kinds.values()) <= result["seconds"]
    assert "padding" in out
    whole, first, per = (result.row for result in recorded.read([tmp_path / "found.json"])[:3])
    assert whole.case == "3 requests, all at once, one GPU"
    assert whole.rate == pytest.approx(found["results"][0]["tokens_per_second"])
    assert first.median == pytest.approx(found["results"][0]["first_token_ms"][0])
    assert per.median == pytest.approx(found["results"][0]["per_token_ms"][0])


def test_other_tokens_alone_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = trace.serve

    def wrong(leader: object, requests: list) -> list[Served]:
        served = right(leader, requests)
        if len(requests) == 1:
            served[0].token_ids[-1] += 1
        return served

    monkeypatch.setattr(trace, "serve", wrong)
    assert trace.main([*SMALL, "0"]) == 1


def test_arrivals_and_lengths() -> None:
    options = trace.parser().parse_args(["--requests", "4000", "--prompt-tokens", "10", "1000"])
    requests = make_trace(options, 8.0, 100)
    lengths = sorted(len(request.prompt) for request in requests)
    assert 10 == lengths[0] < 990 < lengths[-1] <= 1000
    assert 85 < lengths[2000] < 115  # the geometric mean
    assert requests[-1].arrival == pytest.approx(4000 / 8, rel=0.1)
    assert {request.arrival for request in make_trace(options, 0.0, 100)} == {0.0}


def test_figures() -> None:
    served = [Served(1.0, [1.5, 1.7, 2.1], [1, 2, 3]), Served(2.0, [2.25], [4])]
    result = summarize("case", served)
    assert (result.new_tokens, result.seconds) == (4, 2.25)
    assert result.first_token_ms == pytest.approx((375, 497.5))
    assert result.per_token_ms == pytest.approx((300, 300))
    assert result.gap_ms == pytest.approx((300, 398))


@pytest.mark.parametrize("wrong", [["--tp", "0"], ["--prompt-tokens", "9", "3"], ["--rates", "-1"]])
def test_wrong_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trace.main(wrong)
    assert "error: " in capsys.readouterr().err
