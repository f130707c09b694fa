"""The two files of ``generate --prompts``: what a line may ask for, and a file of results that is always whole."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch.console import OutputError
from tp_mamba.launch.jsonl import requests
from tp_mamba.launch.jsonl.requests import BadRequestError, lookalikes, parse, read_lines
from tp_mamba.launch.jsonl.results import Found, ResultsFile, encode, examine

DEFAULTS = SamplingParams(max_new_tokens=7, top_k=3)


def lines_of(folder: Path, content: bytes) -> list[requests.Line]:
    (folder / "requests.jsonl").write_bytes(content)
    return list(read_lines(folder / "requests.jsonl"))


def test_lines_know_their_place(tmp_path: Path) -> None:
    content = b'{"a": 1}\r\n\n  \n{"b": 2}\n{"a": 1}'
    first, second, third = lines_of(tmp_path, content)
    assert [(line.number, line.position, line.content) for line in (first, second, third)] == [
        (1, 0, b'{"a": 1}'),
        (4, 1, b'{"b": 2}'),
        (5, 2, b'{"a": 1}'),
    ]
    assert (first.end, third.end) == (10, len(content))
    assert first.digest == third.digest != second.digest


def test_a_prompt_with_options_and_what_is_carried(tmp_path: Path) -> None:
    text, ids = lines_of(
        tmp_path,
        b'\xef\xbb\xbf{"id": "x", "prompt": "The sea", "temperature": 1, "stop": ["a"], "meta": {"n": [null]}}\n'
        b'{"prompt_token_ids": [1, 2], "top_k": 0}\n',
    )
    asked = parse(text, DEFAULTS)
    assert (asked.prompt, asked.carried) == ("The sea", {"id": "x", "meta": {"n": [None]}})
    assert asked.params == SamplingParams(max_new_tokens=7, top_k=3, temperature=1.0, stop=("a",))
    asked = parse(ids, DEFAULTS)
    assert (asked.prompt, asked.params.top_k, asked.carried) == ([1, 2], 0, {})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"not json", "the line is not JSON (Expecting value at character 1): give one JSON object per line"),
        (b'{"prompt": "a"', "the line is not JSON (Expecting ',' delimiter at character 15)"),
        (b'{"prompt": "a", "x": NaN}', "the line is not JSON (NaN is no number of JSON)"),
        (b'{"prompt": "a", "x": 1e999}', "the line is not JSON (Out of range float values are not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "the line is not JSON (it has the field 'prompt' twice)"),
        (b"[" * 100_000, "the line is not JSON (it is nested too deeply)"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the line is not JSON (Exceeds the limit"),
        (b'{"prompt": "\xff"}', "the line is not UTF-8 at byte 12 (0xff): convert the file to UTF-8"),
        (b'"The sea"', "the line is '\"The sea\"', which is no JSON object: give one, as in"),
        (b'{"id": 1}', "the line has no prompt: give one of"),
        (b'{"Prompts": "a"}', "the line has no prompt, only 'Prompts': give one of"),
        (b'{"prompt": "a", "prompt_token_ids": [1]}', "the line has both prompt and prompt_token_ids: give"),
        (b'{"prompt": ""}', "the prompt is empty: give it at least one character"),
        (b'{"prompt": [1, 2]}', "prompt is [1, 2]: give text, or token ids as prompt_token_ids"),
        (b'{"prompt": "\\ud800 a"}', r"the prompt holds '\ud800' at character 0, half of a pair"),
        (b'{"prompt_token_ids": "1 2"}', "prompt_token_ids is '1 2': give a list of token ids, as in [1, 2]"),
        (b'{"prompt": "a", "temperature": -1}', "temperature=-1.0 is out of range"),
        (b'{"prompt": "a", "top_k": "many"}', "top_k is 'many', which is not an integer"),
        (b'{"prompt": "a", "stop": "x"}', "stop='x' is one string"),
        (b'{"prompt": "a", "text": 1}', "the field 'text' is one of the result: give it another name"),
    ],
)
def test_what_a_line_cannot_ask(content: bytes, told: str, tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, content)
    with pytest.raises(BadRequestError) as refused:
        parse(line, DEFAULTS)
    assert str(refused.value).startswith(told)


def test_a_refused_request_keeps_what_it_carries(tmp_path: Path) -> None:
    for content in (b'{"id": 3}', b'{"id": 3, "prompt": 1}', b'{"id": 3, "prompt": "a", "error": 1}'):
        (line,) = lines_of(tmp_path, content)
        with pytest.raises(BadRequestError) as refused:
            parse(line, DEFAULTS)
        assert refused.value.carried == {"id": 3}


def test_a_line_too_long_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MOST_BYTES", 30)
    content = b'{"prompt": "%s"}\n' % (b"a" * 3_000_000)
    long, other, short = lines_of(tmp_path, content + content.replace(b'a"', b'b"') + b'{"prompt": "b"}\n')
    assert len(long.content) < 40
    assert long.digest != other.digest
    assert (short.number, parse(short, DEFAULTS).prompt) == (3, "b")
    with pytest.raises(BadRequestError, match=r"^the line is longer than 0 MiB: give a shorter prompt"):
        parse(long, DEFAULTS)


def test_misspelt_options_are_noticed() -> None:
    carried = dict.fromkeys(["max_tokens", "Temperature", "id", "topic", "seed_id", "name", "stops"])
    assert dict(lookalikes(carried)) == {
        "max_tokens": "max_new_tokens",
        "Temperature": "temperature",
        "stops": "stop",
    }


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Four requests, the second of which will fail."""
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(f'{{"prompt": "{word}"}}\n' for word in ("a", "b", "c", "d")))
    return path


def result(path: Path, position: int, error: str | None = None) -> bytes:
    line = list(read_lines(path))[position]
    reason = "length" if error is None else "error"
    return encode(line, "s", {"n": position}, text="ü", token_ids=[1], finish_reason=reason, error=error)


def test_results_come_in_order_whatever_the_order_they_are_made_in(asked: Path, tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "out", Found(), fresh=True)
    for position, written, waiting in ((2, 0, 1), (0, 1, 1), (3, 1, 2), (1, 4, 0)):
        results.put(position, result(asked, position))
        assert (results.written, results.waiting) == (written, waiting)
        assert (tmp_path / "out").read_bytes().count(b"\n") == written  # at once
    results.close()
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["n"] for line in lines] == [0, 1, 2, 3]
    assert (lines[0]["text"], lines[0]["error"]) == ("ü", None)


def write(asked: Path, path: Path, upto: int) -> None:
    results = ResultsFile(path, Found(), fresh=True)
    for position in range(upto):
        results.put(position, result(asked, position, "broken" if position == 1 else None))
    results.close()


def test_a_file_cut_anywhere_is_continued_without_a_line_lost_or_doubled(asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(asked, out, 4)
    whole = out.read_bytes()
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        found = examine(asked, out, resume=True, overwrite=False)
        assert found.lines == whole[:cut].count(b"\n")
        assert found.size + found.tail == cut
        assert (found.failed, found.first_failure) == ((1, (2, "broken")) if found.lines > 1 else (0, None))
        results = ResultsFile(out, found, fresh=False)
        for position in range(found.lines, 4):
            results.put(position, result(asked, position, "broken" if position == 1 else None))
        results.close()
        assert out.read_bytes() == whole


def refusal(asked: Path, out: Path, **options: bool) -> str:
    with pytest.raises(ValueError, match=r"^(--|line)") as refused:
        examine(asked, out, **{"resume": False, "overwrite": False, **options})
    return str(refused.value)


def test_files_that_cannot_work_are_refused_beforehand(asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert examine(asked, out, resume=True, overwrite=False) == Found()
    assert not out.exists()
    write(asked, out, 2)
    assert f"--output {out} exists: --resume goes on with it, --overwrite begins" in refusal(asked, out)
    assert examine(asked, out, resume=False, overwrite=True) == Found()
    assert "cannot be read (No such file" in refusal(tmp_path / "none", out)
    assert "is no file: give one with one JSON object" in refusal(tmp_path, out)
    assert "there is no folder" in refusal(asked, tmp_path / "no" / "out")
    assert "is no file: results need one" in refusal(asked, tmp_path, overwrite=True)
    assert "is the file of --prompts: name another" in refusal(asked, asked, overwrite=True)
    results = ResultsFile(out, examine(asked, out, resume=True, overwrite=False), fresh=False)
    assert "is being written by another process" in refusal(asked, out, resume=True)
    results.close()
    with pytest.raises(ValueError, match="was made by another process just now"):
        ResultsFile(out, Found(), fresh=True)


def test_only_results_of_these_requests_are_continued(asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(asked, out, 3)
    before, whole = asked.read_text(), out.read_bytes()
    asked.write_text(before.replace("b", "B"))
    assert f"line 2 of --output {out} was made from another request than line 2 of" in refusal(
        asked, out, resume=True
    )
    asked.write_text(before[: before.index('{"prompt": "c"}')])
    assert f"line 3 of --output {out} has no request: --prompts {asked} holds only 2" in refusal(
        asked, out, resume=True
    )
    asked.write_text(before)
    out.write_bytes(whole.replace(b'-s"}', b'-t"}', 1))
    assert f"line 2 of --output {out} was made with other settings than line 1" in refusal(
        asked, out, resume=True
    )
    for foreign in (b"{}\n", b"[1]\n", b"text\n", b'{"made_from": 1, "error": null}\n'):
        out.write_bytes(foreign)
        assert f"line 1 of --output {out} is no result of tp-mamba" in refusal(asked, out, resume=True)
    assert out.read_bytes() == foreign
    assert refusal(asked, out)  # as before, without --resume
    found = Found(lines=1, size=5, tail=0)
    with pytest.raises(ValueError, match="has grown since this command began"):
        ResultsFile(out, found, fresh=False)
    assert out.read_bytes() == foreign


def test_a_full_disk_leaves_whole_lines(asked: Path, tmp_path: Path) -> None:
    out, size = tmp_path / "out", len(result(asked, 0))
    results = ResultsFile(out, Found(), fresh=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + size // 2, hard))
    try:
        results.put(0, result(asked, 0))
        results.put(1, result(asked, 1))
        with pytest.raises(
            OutputError, match=r"takes no more \(File too large\): results in it so far: 2, make room"
        ):
            results.put(2, result(asked, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    results.close()
    assert out.read_bytes() == result(asked, 0) + result(asked, 1)


def test_a_full_disk_that_cannot_even_be_cut(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "out", os.write
    results = ResultsFile(out, Found(), fresh=True)
    results.put(0, result(asked, 0))
    left = iter([7])

    def full(descriptor: int, content: bytes) -> int:
        if (room := next(left, None)) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, content[:room])

    def broken(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "ftruncate", broken)
    with pytest.raises(OutputError, match=r"\(No space left on device\): results in it so far: 1, make"):
        results.put(1, result(asked, 1))
    monkeypatch.undo()
    results.close()
    assert out.read_bytes() == result(asked, 0) + result(asked, 1)[:7]
    found = examine(asked, out, resume=True, overwrite=False)
    assert (found.lines, found.tail) == (1, 7)
