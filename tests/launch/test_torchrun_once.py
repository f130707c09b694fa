"""Verbs that compute nothing on ranks, under torchrun: rank 0 alone speaks, and plan is that of its ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tp_mamba.launch import cli


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """``world(rank)``: be that rank of two that torchrun has started."""

    def as_rank(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")

    return as_rank


@pytest.mark.parametrize(("extra", "ranks"), [([], 2), (["--tp", "4"], 4), (["--tp", "1"], 1)])
def test_plan_is_of_the_ranks_that_torchrun_started(
    extra: list[str], ranks: int, world, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world(0)
    assert cli.main(["plan", str(sample), "--json", *extra]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == ranks


def test_rank_0_alone_speaks(world, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    calls = {"plan": [], "info": ["--json"], "shard": [out, "--tp", "2"], "merge": [out]}
    world(1)
    for verb, extra in calls.items():
        assert cli.main([verb, str(sample), *extra]) == 0
        assert cli.main([verb, str(tmp_path / "none"), *extra]) == 0
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    world(0)
    assert cli.main(["info", str(sample), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"] is True
