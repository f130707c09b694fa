"""Finding tokenizer.json: in a folder, on the hub, or saying what to do about its absence."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers

from tp_mamba.checkpoint import location
from tp_mamba.parallel.group import RankFailedError, TensorParallel
from tp_mamba.text.detokenizer import special_token_ids
from tp_mamba.text.tokenizer import end_of_ids, load_tokenizer

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


def test_truncation_and_padding_of_a_training_run_are_switched_off(folder: Path) -> None:
    left = Tokenizer.from_file(str(folder / "tokenizer.json"))
    left.pre_tokenizer = pre_tokenizers.Whitespace()
    left.enable_truncation(2)
    left.enable_padding(length=5)
    left.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a b a").ids == [0, 1, 0]
    assert tokenizer.encode("a").ids == [0]


def declare(folder: Path, decoder: dict[str, object], **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, **config}))


def test_dropout_of_merges_is_switched_off(tmp_path: Path) -> None:
    """Left on, each rank would encode its prompts in its own way, and otherwise in the next call."""
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    Tokenizer(models.BPE(vocab, merges, dropout=0.9)).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abcd" * 20).ids == [6] * 20


def test_declared_tokens_that_the_file_lacks_are_added(folder: Path) -> None:
    declare(
        folder,
        {
            "4": {"content": "<|end|>", "special": True},
            "3": {"content": "<|user|>", "special": False, "lstrip": True},
            "1": {"content": "b", "special": False},
        },
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": 5}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a<|user|>").ids[-1] == 3
    assert tokenizer.encode("<|end|><tool>").ids == [4, 5]
    assert special_token_ids(tokenizer) == {4}
    assert end_of_ids(tokenizer) == 6
    assert tokenizer.get_added_tokens_decoder()[3].lstrip


def test_the_tokenizers_own_file_has_the_last_word(folder: Path) -> None:
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before.add_special_tokens(["<eos>"])  # id 3
    before.save(str(folder / "tokenizer.json"))
    declare(folder, {"7": {"content": "<eos>", "special": False}})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.token_to_id("<eos>") == 3
    assert special_token_ids(tokenizer) == {3}


def test_a_declared_id_that_the_token_would_not_get_is_refused(folder: Path) -> None:
    declare(folder, {"9": {"content": "<eos>", "special": True}})
    with pytest.raises(
        ValueError, match=r"declares the token '<eos>' with id 9, beside this .* it has id 3:"
    ):
        load_tokenizer(folder)


def _load_where_one_rank_has_none(tp: TensorParallel, folder: Path) -> str:
    try:
        load_tokenizer(folder if tp.rank != 1 else folder / "elsewhere", tp)
    except (ValueError, RankFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_one_rank_without_a_tokenizer_stops_them_all(ranks, folder: Path) -> None:
    told = ranks(2).run(_load_where_one_rank_has_none, folder)
    assert told[0].startswith("RankFailedError: rank 1 of 2 failed: CheckpointError: ")
    assert told[1].startswith("CheckpointError: ")
