"""What a file says reaches a message printable, on one line and short."""

import pytest

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.checkpoint.json_file import read_json_object
from tp_mamba.quoting import quoted, shown, shown_path

HOSTILE = ["\x1b[31mred", "two\nlines", "\udc80", "\u202egnp.exe", "tab\t", "\x00", "\u2028", "\x9b2J"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text(text):
    for made in (shown(text), quoted(text), quoted({text: [text]}), shown_path(f"/a/{text}")):
        assert made.isprintable()
        assert "\\" in made
        made.encode()  # a lone surrogate has no encoding


@pytest.mark.parametrize("text", ["backbone.layers.0.mixer.A_log", "Grüße 你好 é"])
def test_plain_text_stays(text):
    assert shown(text) == text
    assert quoted(text) == repr(text)


def test_long_text_keeps_both_ends():
    made = shown("a" * 10**6 + "b" * 10**6)
    assert len(made) < 130
    assert made.startswith("aaa")
    assert made.endswith("bbb")
    assert len(quoted("x" * 10**6)) < 300
    assert len(quoted(list(range(10**5)))) < 300
    assert len(shown_path("/" * 10**5)) < 420


def test_values():
    nested: list = []
    for _ in range(10**5):
        nested = [nested]
    assert quoted(nested) == "[[[...]]]"
    assert quoted(None) == "None"
    assert quoted(10**30) == str(10**30)
    assert len(quoted(10**4000)) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode"),
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_the_library_refuses_is_named(content, reason, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} is not JSON.*{reason}.*: fetch it again"):
        read_json_object(path)


def test_json_of_another_kind(tmp_path):
    (tmp_path / "x.json").write_text("3")
    with pytest.raises(CheckpointError, match="holds a JSON int, it must be an object of fields"):
        read_json_object(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="cannot be read \\(Is a directory\\)"):
        read_json_object(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "absent.json")
