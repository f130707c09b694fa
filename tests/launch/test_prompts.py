"""Prompts under torchrun: rank 0 reads, all ranks get the same, and an error stops all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import rank_jobs

from tp_mamba.launch.ranks.failures import LaunchError
from tp_mamba.launch.ranks.start import start_ranks


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """A folder for each of two ranks, with another prompt.txt in each."""
    for name, text in (("first", "of rank 0\n"), ("second", "of rank 1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompt.txt").write_text(text)
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def test_every_rank_gets_what_rank_0_reads(folders: list[str]) -> None:
    shared = start_ranks(rank_jobs.share_from, folders, "prompt.txt", size=2)
    assert shared == [["of the command", "of rank 0"]] * 2


def test_an_error_of_rank_0_stops_every_rank(folders: list[str]) -> None:
    Path(folders[0], "prompt.txt").write_bytes(b"a\xff")
    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"^--prompt-file prompt\.txt is not UTF-8 at byte 1 \(0xff\)"):
        start_ranks(rank_jobs.share_from, folders, "prompt.txt", size=2)
    assert time.monotonic() - start < 60
