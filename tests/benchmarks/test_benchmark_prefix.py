"""The benchmark of kept states, on a CPU and small: what it counts, and what it sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import prefix, recorded
from benchmarks.served import Served
from tp_mamba.state.cache import MambaCache

SMALL = "--model tiny --dtype float32 --device cpu --requests 3 --shared-tokens 64 --block-size 64 --own-tokens 33"
SMALL += " --turns 3 --turn-tokens 40 --new-tokens 3 --max-batch-size 2 --check 1"


def test_a_run_tells_what_is_computed_with_states_kept_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefix.main([*SMALL.split(), "--json", str(tmp_path / "found.json")]) == 0
    assert "equal to the bit" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    counted = {(r["case"], r["kept"]): (r["prompt_tokens"], r["computed_tokens"]) for r in found["results"]}
    said = 40 + 83 + 126  # each turn brings 40, and the answer of 3 before it
    assert counted == {
        ("shared", False): (3 * 97, 3 * 97),
        ("shared", True): (3 * 97, 64 + 3 * 33),
        ("conversation", False): (said, said),
        ("conversation", True): (said, 40 + 41 + 41),  # the last token of an answer was never read
    }
    names = [result.row.case for result in recorded.read([tmp_path / "found.json"])]
    assert names[:2] == ["shared, states not kept, one GPU", "shared, states not kept, one GPU, first token"]
    assert len(names) == 4 * 3
    for result in found["results"]:
        assert result["same_texts"] == [9, 9]
        assert result["tokens_per_second"] == pytest.approx(9 / result["seconds"])


def test_a_kept_state_that_is_off_is_a_failure_and_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = MambaCache.copy

    def wrong(self: MambaCache, source: int, target: int) -> None:
        right(self, source, target)
        self.ssm_states[:, target] *= 1 + 1e-6

    monkeypatch.setattr(MambaCache, "copy", wrong)
    assert prefix.main(SMALL.split()) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a kept state gave other bits: prompt 1 is off by" in captured.err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--shared-tokens 65", "a multiple of the block size"),
        ("--own-tokens 31", "--own-tokens 31 is too few"),
        ("--requests 1", "more requests than are checked"),
    ],
)
def test_wrong_usage(wrong: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prefix.main([*SMALL.split(), *wrong.split()])
    assert says in capsys.readouterr().err


def test_texts_are_compared_up_to_the_first_difference() -> None:
    def served(ids: list[int]) -> Served:
        return Served(0.0, [0.0] * len(ids), ids)

    assert prefix.same_tokens([served([1, 2, 3])], [served([1, 9, 3])]) == (1, 3)
    assert prefix.same_tokens([served([1]), served([2])], [served([1]), served([2])]) == (2, 2)
