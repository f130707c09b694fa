"""``tp-mamba shard`` and ``merge`` write over no checkpoint that they were not told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tp_mamba.launch import cli


def weight_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_shard_and_merge_over_a_checkpoint(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, three, full = (str(tmp_path / name) for name in ("two", "three", "full"))
    assert cli.main(["shard", str(sample), two, "--tp", "2"]) == 0
    assert cli.main(["shard", two, three, "--tp", "3"]) == 0
    assert cli.main(["merge", two, full]) == 0
    capsys.readouterr()
    held = "holds a checkpoint already: choose another folder, or pass --overwrite"
    before = {folder: weight_files(Path(folder)) for folder in (two, three, full)}
    for command in (["shard", full, three, "--tp", "2"], ["merge", two, three], ["merge", three, full]):
        refused(command, held, capsys)
    for command in (["shard", two, two, "--tp", "3"], ["merge", two, two]):
        refused(command, "holds the checkpoint to be read", capsys)
        refused([*command, "--overwrite"], "holds the checkpoint to be read", capsys)
    assert before == {folder: weight_files(Path(folder)) for folder in (two, three, full)}
    assert cli.main(["shard", full, three, "--tp", "2", "--overwrite"]) == 0
    assert weight_files(Path(three)) == weight_files(Path(two))
    assert cli.main(["merge", two, three, "--overwrite"]) == 0
    assert weight_files(Path(three)) == weight_files(Path(full))


def test_shard_advises_a_rank_count_that_loads(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The sample has 1024 channels and 512 vocabulary rows.
    command = ["shard", str(sample), str(tmp_path / "out"), "--tp", "2000"]
    refused(command, "choose 1 to 512 ranks", capsys)
    assert not (tmp_path / "out").exists()


def test_merge_converts_what_its_help_says(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    assert "any other checkpoint" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["merge", str(sample), str(tmp_path / "full")]) == 0
    assert weight_files(tmp_path / "full") == ["model.safetensors"]
