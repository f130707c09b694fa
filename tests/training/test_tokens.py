"""Token ids of files: what becomes of texts, what is kept, and what is refused."""

import json

import numpy as np
import pytest

from tp_mamba.training import tokens as module
from tp_mamba.training.setup import byte_tokenizer
from tp_mamba.training.tokens import read_tokens

TEXT = "Ein Fluß, 川, naïve\r\n\tq'e  x"


def documents_of(tokens):
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.bounds[:-1], tokens.bounds[1:], strict=True)]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_bytes_are_their_own_ids(tmp_path, cache):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    tokens = read_tokens([tmp_path / "a.txt"], None, cache=cache, end_of_text=0)
    assert documents_of(tokens) == [[*TEXT.encode(), 0]]


def test_the_byte_tokenizer_says_the_same(tmp_path):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(TEXT).ids == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))


def test_each_json_line_is_a_document(tmp_path, cache):
    lines = [json.dumps({"body": text}) for text in ("ab", "", "c")]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    (tmp_path / "b.txt").write_text("de")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    tokens = read_tokens(paths, byte_tokenizer(), cache=cache, field="body")
    assert documents_of(tokens) == [[97, 98], [99], [100, 101]]


def test_tokens_are_computed_once(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    first = read_tokens([path], None, cache=cache)
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(read_tokens([path], None, cache=cache).ids, first.ids)
    monkeypatch.undo()
    assert len(read_tokens([path], None, cache=cache, end_of_text=0)) == 4
    path.write_text("abcd")
    assert len(read_tokens([path], None, cache=cache)) == 4


def test_what_was_half_written_is_written_again(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("abc")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match=r"cannot keep the tokens .*No space left on device.*--cache"):
        read_tokens([path], None, cache=cache)
    monkeypatch.undo()
    assert len(read_tokens([path], None, cache=cache)) == 3


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9 ol\xe9", "is not UTF-8"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', "line 2 has no string under 'text'"),
        ("number.jsonl", b'{"text": 5}\n', "line 1 has no string under 'text'"),
        ("broken.jsonl", b'{"text": \n', "line 1 is no JSON"),
        ("blank.jsonl", b"\n\n", "holds no text"),
    ],
)
def test_bad_files_are_refused(tmp_path, cache, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_tokens([tmp_path / name], None, cache=cache)
    assert name in str(error.value)


def test_a_folder_is_no_data_file(tmp_path, cache):
    with pytest.raises(ValueError, match="is not a file"):
        read_tokens([tmp_path], None, cache=cache)
