"""Whatever stdout and stderr are, a person gets a sentence and a status; what files hold cannot rewrite a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tp_mamba.launch import cli, console
from tp_mamba.launch.console import harmless, visible

COMMAND = Path(sys.executable).parent / "tp-mamba"
FULL = (
    "tp-mamba {}: error: standard output takes no more (No space left on device): the result is not whole\n"
)
ESCAPED = "note: what the output's encoding cannot say was escaped; PYTHONIOENCODING=utf-8 says all\n"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which $C is the command; its output is buffered, unless ``environment`` says otherwise."""
    environment = {**os.environ, "C": str(COMMAND), "PYTHONUNBUFFERED": "", **environment}
    return subprocess.run(
        ["sh", "-c", line], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder, not only of ASCII, with the config.json of a small model."""
    folder = tmp_path / "modèle"
    folder.mkdir()
    config = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("extra", ["", "--json"])
def test_a_full_stdout(extra: str, published: Path) -> None:
    done = shell(f"$C plan {published} {extra} > /dev/full")
    assert (done.returncode, done.stderr) == (1, FULL.format("plan"))


@pytest.mark.parametrize(("words", "told"), [("--help", "tp-mamba"), ("plan --help", "tp-mamba plan")])
def test_help_into_a_full_stdout(words: str, told: str) -> None:
    done = shell(f"$C {words} > /dev/full")
    assert (done.returncode, done.stderr) == (1, FULL.replace("tp-mamba {}", told))
    done = shell(f"$C {words} > /dev/full", PYTHONUNBUFFERED="1")
    assert (done.returncode, done.stderr) == (1, FULL.replace("tp-mamba {}", told))


def test_a_closed_stdout(published: Path) -> None:
    done = shell(f"$C plan {published} >&-")
    assert done.returncode == 1
    assert done.stderr == (
        "tp-mamba plan: error: standard output is closed: there is nowhere to print the result\n"
    )


def test_a_closed_stderr(published: Path, tmp_path: Path) -> None:
    done = shell(f"$C plan {tmp_path / 'none'} 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")  # and none of it on stdout
    assert shell("$C plan 2>&-").returncode == 2
    done = shell(f"$C plan {published} --json 2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["ranks"] == 1


def test_an_ascii_terminal(published: Path) -> None:
    done = shell(f"$C plan {published}", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"mod\xe8le over 1 rank" in done.stdout
    assert done.stderr == f"tp-mamba plan: {ESCAPED}"
    done = shell(f"$C plan {published} --json", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["checkpoint"] == str(published)
    assert done.stderr == ""
    done = shell(f"$C info {published}", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert r"mod\xe8le" in done.stderr


EVIL = "a\x1b[31mb\x9bc\x7fd\u202ee"


def test_names_from_files_and_arguments_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / EVIL
    folder.mkdir()
    config = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    for extra in ([], ["--json"], ["--tp", "6000"]):
        assert cli.main(["plan", str(folder), *extra]) == bool("--tp" in extra)
        out, err = capsys.readouterr()
        assert (out + err).replace("\n", "").isprintable()
        assert "--tp" in extra or "\\" in out
    (folder / "config.json").write_text(json.dumps({**config, "model_type": EVIL}))
    assert cli.main(["plan", str(folder), "--debug"]) == 1
    assert capsys.readouterr().err.replace("\n", "").isprintable()


def test_text_of_a_model_is_harmless_on_a_terminal_and_as_it_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    text = "tab\tline\nbell\x07 clear\x1b[2J é\u00a0\U0001f469\u200d\U0001f52c"
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        console.write_generated(text)
    shown = os.read(ours, 1000).decode().replace("\r\n", "\n")
    os.close(ours)
    assert shown == text.replace("\x07", r"\x07").replace("\x1b", r"\x1b")
    console.write_generated(text)
    assert capfdbinary.readouterr().out.decode() == text


@pytest.mark.parametrize(
    ("text", "name", "generated"),
    [
        ("plain é", "plain é", "plain é"),
        ("a\tb\n", r"a\tb\n", "a\tb\n"),
        ("\x1b]0;x\x07", r"\x1b]0;x\x07", r"\x1b]0;x\x07"),
        ("a\u202eb", r"a\u202eb", "a\u202eb"),
        ("\udcff", r"\udcff", r"\udcff"),
    ],
)
def test_escapes(text: str, name: str, generated: str) -> None:
    assert visible(text) == name
    assert harmless(text) == generated
