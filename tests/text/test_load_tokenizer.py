"""Finding tokenizer.json: in a folder, on the hub, or saying what to do about its absence."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models

from tp_mamba.checkpoint import location
from tp_mamba.text.tokenizer import load_tokenizer

REMEDY = r"pass --tokenizer EleutherAI/gpt-neox-20b .* or a folder with a tokenizer\.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")).save(
        str(tmp_path / "tokenizer.json")
    )
    return tmp_path


def test_a_folder_with_a_tokenizer(folder: Path) -> None:
    assert load_tokenizer(folder).encode("b").ids == [1]
    assert load_tokenizer(str(folder)).encode("a").ids == [0]


def test_a_folder_without_one_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"holds no tokenizer.json: {REMEDY}"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        load_tokenizer(folder)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """A hub that answers with ``folder``; what it was asked for."""
    asked = []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(location, "model_info", lambda name, *, timeout: None)
    monkeypatch.setattr(location, "snapshot_download", download)
    return asked


def test_a_hub_name_downloads_the_tokenizers_files_and_no_others(hub: list) -> None:
    assert load_tokenizer("EleutherAI/gpt-neox-20b").get_vocab_size() == 3
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    assert hub == [("EleutherAI/gpt-neox-20b", files)]


def test_a_repository_without_one_says_what_to_pass(hub: list, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"^owner/name holds no tokenizer.json: {REMEDY}$"):
        load_tokenizer("owner/name")


def test_an_earlier_download_serves_where_the_hub_does_not_answer(
    hub: list, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, *, timeout: float) -> None:
        raise ConnectionError("no route to host\nwith a second line")

    monkeypatch.setattr(location, "model_info", fail)
    assert load_tokenizer("owner/name").get_vocab_size() == 3
    (folder / "tokenizer.json").rename(folder / "config.json")  # the earlier download was of another file
    with pytest.raises(ValueError, match=rf"^owner/name .* \(no route to host\): .*{REMEDY}$") as error:
        load_tokenizer("owner/name")
    assert "\n" not in str(error.value)


def test_offline_says_so(hub: list, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_tokenizer("owner/name").get_vocab_size() == 3
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"^owner/name .* HF_HUB_OFFLINE is set: .*{REMEDY}$"):
        load_tokenizer("owner/name")


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(hub: list, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"^no/such/folder does not exist: {REMEDY}$"):
        load_tokenizer("no/such/folder")
    with pytest.raises(ValueError, match=f"tokenizer.json is a file, and the folder .*: {REMEDY}$"):
        load_tokenizer(folder / "tokenizer.json")
    assert not hub
