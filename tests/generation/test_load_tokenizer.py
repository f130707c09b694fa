"""Finding tokenizer.json: in a folder, on the hub, or saying what to do about its absence."""

from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from tokenizers import Tokenizer, models

from tp_mamba.generation import tokenizer as module
from tp_mamba.generation.tokenizer import load_tokenizer

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


def test_a_hub_name_downloads_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, file: str, **_: object) -> str:
        asked.append((name, file))
        return str(folder / file)

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert load_tokenizer("EleutherAI/gpt-neox-20b").get_vocab_size() == 3
    assert asked == [("EleutherAI/gpt-neox-20b", "tokenizer.json")]


class RefusedError(HfHubHTTPError):
    def __init__(self) -> None:
        Exception.__init__(self, "401 Client Error\nRepository Not Found")


class MissingError(EntryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (LocalEntryNotFoundError("offline"), "is not a folder here, and the hub cannot be reached"),
        (MissingError(), "holds no tokenizer.json on the hub"),
        (RefusedError(), r"is not a model that the hub gives out \(401 Client Error\)"),
    ],
)
def test_what_the_hub_answers_is_told_in_one_line(
    failure: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(module, "hf_hub_download", download)
    with pytest.raises(ValueError, match=f"^owner/name {reason}.*{REMEDY}$") as error:
        load_tokenizer("owner/name")
    assert "\n" not in str(error.value)


def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(ValueError, match="no/such/folder is neither a folder nor a model name"):
        load_tokenizer("no/such/folder")
