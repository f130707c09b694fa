"""The command's face: help, version, exit statuses, and one sentence for whatever is wrong. No ranks here."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tp_mamba.checkpoint.leftovers import LeftoverWarning
from tp_mamba.launch import cli
from tp_mamba.launch.arguments import rank_count, rank_counts
from tp_mamba.launch.prompts import read_prompts
from tp_mamba.launch.ranks.start import make_tensor_parallel, resolve_rank_count
from tp_mamba.launch.verbs import info
from tp_mamba.parallel.group import TensorParallel


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing may be on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert left.value.code == 0
    assert f"tp-mamba {verb} ./" in capsys.readouterr().out


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {verb} " in out for verb in cli.VERBS)
    assert "torchrun --nproc-per-node" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"tp-mamba {version('tp-mamba')}\n"


@pytest.mark.parametrize(
    ("module", "verb"),
    [
        *(("tp_mamba.launch", verb) for verb in cli.VERBS),
        *((f"tp_mamba.launch.{v}", v) for v in ("generate", "verify")),
    ],
)
def test_help_of_a_module_needs_no_torch(module: str, verb: str) -> None:
    words = [verb, "--help"] if module == "tp_mamba.launch" else ["--help"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', *{words!r}]\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    sys.exit(left.code or ('torch' in sys.modules) * 77)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: tp-mamba {verb} ")


@pytest.mark.parametrize("verb", ["generate", "verify", "plan", "info", "shard"])
def test_a_folder_that_is_not_there(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "no-such-folder"
    rest = {"generate": ["--prompt", "x"], "shard": [str(tmp_path / "out"), "--tp", "2"]}.get(verb, [])
    assert cli.main([verb, str(folder), *rest]) == 1
    line = error_line(capsys)
    assert line.startswith(f"tp-mamba {verb}: error: ")
    assert str(folder) in line


def test_merge_of_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["merge", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert error_line(capsys).startswith("tp-mamba merge: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--prompt", "a", "--prompt", ""], "prompt 2 of 2 is empty: give it at least one character"),
        (["--prompt", "a\udcff"], r"--prompt 'a\udcff' is not UTF-8 at byte 1 (0xff): convert"),
        (
            ["--prompt-file", "/no/such"],
            "--prompt-file /no/such cannot be read (No such file or directory)",
        ),
        (
            ["--prompt-file", "/"],
            "--prompt-file / cannot be read (Is a directory): give a text file in UTF-8",
        ),
    ],
)
def test_what_generate_refuses(
    extra: list[str], told: str, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(sample), *extra]) == 1
    assert told in error_line(capsys)


@pytest.mark.parametrize(
    ("verb", "extra"), [("generate", ["--prompt", "a", "--tp", "101"]), ("verify", ["--tp", "1,101"])]
)
def test_more_ranks_than_this_model_takes(
    verb: str, extra: list[str], sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((sample / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert cli.main([verb, str(tmp_path), *extra, "--device", "cpu"]) == 1
    assert "for 101 tensor-parallel ranks: use at most 100 ranks" in error_line(capsys)


def test_verify_of_an_empty_standard_input(
    sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert cli.main(["verify", str(sample), "--prompt", "-"]) == 1
    assert "prompt 1 of 1 is empty" in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\n", "prompt 1 of 1 is empty"),
        (b"ab\xff", "--prompt -: standard input is not UTF-8 at byte 2 (0xff): convert the text to UTF-8"),
    ],
)
def test_bad_standard_input(
    content: bytes,
    told: str,
    sample: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    assert cli.main(["generate", str(sample), "--prompt", "-"]) == 1
    assert told in error_line(capsys)


def test_closed_standard_input(
    sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["generate", str(sample), "--prompt", "-"]) == 1
    assert "standard input is closed: give the text through a pipe" in error_line(capsys)


def test_a_prompt_file_that_is_not_utf8(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("é".encode("latin-1"))
    assert cli.main(["generate", str(sample), "--prompt-file", str(file)]) == 1
    assert f"--prompt-file {file} is not UTF-8 at byte 0 (0xe9)" in error_line(capsys)


def test_prompts_are_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("größer\r\nas\n".encode())
    piped = io.TextIOWrapper(io.BytesIO("früh\n\n".encode()), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", piped)
    as_ascii = "ä".encode().decode("ascii", "surrogateescape")  # as sys.argv has it in an ASCII locale
    assert read_prompts(["ä", as_ascii, "-"], [str(file)]) == ["ä", "ä", "früh\n", "größer\nas"]


def test_debug_shows_the_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tmp_path / "none"), "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("tp-mamba plan: error: ")


def test_tp_under_torchrun_must_be_the_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve_rank_count(None, None) == 4
    assert resolve_rank_count("auto", None) == 4
    assert resolve_rank_count(4, None) == 4
    with pytest.raises(ValueError, match=r"^--tp 2 under torchrun with 4 ranks: leave --tp out, or start"):
        resolve_rank_count(2, None)


def test_gloo_means_a_cpu_at_one_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, "_default_device", lambda _: torch.device("meta"))
    assert make_tensor_parallel(None, "gloo").device.type == "cpu"
    assert make_tensor_parallel(None, None).device.type == "meta"


def test_rank_counts() -> None:
    assert rank_counts("1, 2,4,2") == [1, 2, 4]
    assert rank_count("auto") == "auto"
    assert rank_count("8") == 8
    with pytest.raises(argparse.ArgumentTypeError):
        rank_counts("1,")


def test_auto_on_a_cpu_is_one_rank() -> None:
    assert resolve_rank_count("auto", "cpu") == 1
    assert resolve_rank_count(None, None) == 1


def test_several_errors_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A file in place of config.json's JSON: the parser's own text must not break the line.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"})[:-1] + "\n\n")
    assert cli.main(["info", str(tmp_path)]) == 1
    assert "config.json" in error_line(capsys)


def test_an_error_of_a_library_names_the_checkpoint(
    sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(folder: Path) -> dict:
        raise OverflowError("too deep")

    monkeypatch.setattr(info, "inspect_checkpoint", overflow)
    assert cli.main(["info", str(sample)]) == 1
    assert error_line(capsys) == f"tp-mamba info: error: OverflowError: too deep ({sample})"


def test_notes_of_this_package_are_sentences(
    sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noting(folder: Path) -> dict:
        warnings.warn("removed .x.new, which a killed writer had left", LeftoverWarning, stacklevel=2)
        return report(folder)

    report = info.inspect_checkpoint
    monkeypatch.setattr(info, "inspect_checkpoint", noting)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["info", str(sample), "--json"]) == 0
    assert error_line_of(capsys.readouterr().err) == (
        "tp-mamba info: note: removed .x.new, which a killed writer had left"
    )


def test_a_leftover_is_named_once(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(sample)
    (tmp_path / ".model.0123abcd.new").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["info", str(tmp_path / "model")]) == 0
        assert ".model.0123abcd.new was left by a killed writer" in error_line_of(capsys.readouterr().err)
        assert cli.main(["info", str(tmp_path / "model")]) == 0  # in the same process
        monkeypatch.setenv("LOCAL_RANK", "1")
        (tmp_path / ".model.4567abcd.new").mkdir()
        assert cli.main(["info", str(tmp_path / "model")]) == 0
        assert capsys.readouterr().err == ""


def error_line_of(err: str) -> str:
    (line,) = err.splitlines()
    return line
