"""``tp-mamba generate --prompts FILE --output FILE``: the results, the memory it takes, and kills at any moment."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_generate_verb import HERE, arguments, command

from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch import cli
from tp_mamba.launch.jsonl import run as jsonl_run
from tp_mamba.launch.jsonl.results import ResultsFile
from tp_mamba.model import MambaForCausalLM
from tp_mamba.text.tokenizer import load_tokenizer

BAD = ("no json", '{"id": "no prompt"}', '{"prompt": "a", "top_k": -1}', '{"prompt_token_ids": [1, 512]}')


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty requests of many lengths, four of them bad, with some blank lines between them."""
    rng, path = random.Random(3), tmp_path_factory.mktemp("requests") / "requests.jsonl"
    with path.open("w") as file:
        for i in range(16):
            request: dict[str, Any] = {"id": i, "max_new_tokens": rng.choice([1, 2, 5])}
            request |= {"temperature": 0.9, "seed": i} if i % 3 == 0 else {}
            ids = [rng.randrange(512) for _ in range(rng.choice([1, 5, 12]))]
            request |= {"prompt": "We are" * rng.randint(1, 3)} if i % 2 else {"prompt_token_ids": ids}
            file.write(json.dumps(request) + "\n" + "\n" * (i % 7 == 0))
            if i % 4 == 2:
                file.write(BAD[i // 4] + "\n")
    return path


@pytest.fixture(scope="module")
def whole(sample: Path, requests: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The results of one run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert cli.main(file_arguments(sample, requests, out)) == 1  # some have failed
    return out.read_bytes()


def file_arguments(sample: Path, requests: Path, out: Path, *extra: str) -> list[str]:
    return arguments(
        sample, "--prompts", str(requests), "--output", str(out), "--max-batch-size", "3", *extra
    )


def test_every_result_is_that_of_a_call_with_all_prompts(sample: Path, requests: Path, whole: bytes) -> None:
    results = [json.loads(line) for line in whole.splitlines()]
    asked = [line for line in requests.read_text().splitlines() if line]
    assert len(results) == len(asked) == 20
    tokenizer, good, params = load_tokenizer(sample), [], []
    for line in asked:
        if line in BAD:
            good.append([0])  # so that places, and with them random numbers, are those of the file
            params.append(SamplingParams(max_new_tokens=1))
            continue
        request = json.loads(line)
        good.append(request.get("prompt_token_ids") or tokenizer.encode(request["prompt"]).ids)
        options = {name: value for name, value in request.items() if name in ("temperature", "seed")}
        params.append(SamplingParams(max_new_tokens=request["max_new_tokens"], ignore_eos=True, **options))
    expected = MambaForCausalLM.from_pretrained(sample).generate(good, params, tokenizer)
    for line, result, wanted in zip(asked, results, expected, strict=True):
        if line in BAD:
            assert result["finish_reason"] == "error"
            assert result["error"]
            assert result["token_ids"] == []
            continue
        found = [result[name] for name in ("token_ids", "text", "finish_reason", "error")]
        assert found == [wanted.token_ids, wanted.text, wanted.finish_reason, None]
        assert result["id"] == json.loads(line)["id"]
    assert results[asked.index(BAD[1])]["id"] == "no prompt"


def test_what_is_told_at_the_end(
    sample: Path, requests: Path, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_bytes(whole[: len(whole) // 2])
    done = whole[: len(whole) // 2].count(b"\n")
    assert cli.main(file_arguments(sample, requests, out, "--resume")) == 1
    told, err = capsys.readouterr()
    assert told.startswith(f"wrote {out}: 20 results ({done} of them by an earlier run), ")
    assert err.startswith("tp-mamba generate: error: 4 of 20 requests failed, the first of them line ")
    assert "the line is not JSON" in err
    assert cli.main(file_arguments(sample, requests, out, "--resume", "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["results"], report["resumed_after"], report["failed"], report["new_tokens"]) == (
        20,
        20,
        4,
        0,
    )
    assert report["first_failure"]["line"] > 1
    (tmp_path / "good").write_text('{"prompt": "a", "max_tokens": 1}\n')
    assert cli.main(file_arguments(sample, tmp_path / "good", out, "--overwrite")) == 0
    told, err = capsys.readouterr()
    assert told.startswith(f"wrote {out}: 1 results, {12} new tokens")
    note = "line 1: 'max_tokens' is no option and is carried through: max_new_tokens is one"
    assert err == f"tp-mamba generate: note: {note}\n"
    (tmp_path / "empty").write_text("\n")
    assert cli.main(file_arguments(sample, tmp_path / "empty", out, "--overwrite")) == 0
    assert out.read_bytes() == b""


def test_a_file_cut_at_many_places_is_continued(
    sample: Path, requests: Path, whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for cut in (0, len(whole) // 3, whole.index(b"\n"), len(whole) - 1):
        out.write_bytes(whole[:cut])
        assert cli.main(file_arguments(sample, requests, out, "--resume")) == 1
        assert out.read_bytes() == whole


def test_files_and_settings_that_do_not_fit(
    sample: Path, requests: Path, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_bytes(whole)
    for extra, told in (
        ([], "exists: --resume goes on with it, --overwrite begins anew"),
        (["--resume", "--top-k", "7"], "was made with another checkpoint, dtype or other sampling options"),
        (["--resume", "--dtype", "bfloat16"], "was made with another checkpoint, dtype or other sampling"),
    ):
        assert cli.main(file_arguments(sample, requests, out, *extra)) == 1
        assert told in capsys.readouterr().err
        assert out.read_bytes() == whole
    tiny = tmp_path / "requests"
    tiny.write_text("{}\n")
    assert cli.main(file_arguments(sample, tiny, out, "--resume")) == 1
    assert "was made from another request than line 1" in capsys.readouterr().err
    assert cli.main(file_arguments(tmp_path, tiny, out, "--overwrite")) == 1  # no checkpoint
    assert out.read_bytes() == whole


def test_a_disk_that_fills_up(
    sample: Path,
    requests: Path,
    whole: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, put = tmp_path / "out", ResultsFile._write

    def fill_up(self: ResultsFile, content: bytes) -> None:
        if self.written == 11:
            raise self._full(OSError(28, "No space left on device"))
        put(self, content)

    monkeypatch.setattr(ResultsFile, "_write", fill_up)
    assert cli.main(file_arguments(sample, requests, out)) == 1
    told, err = capsys.readouterr()
    assert told == ""
    assert err == (
        f"tp-mamba generate: error: --output {out} takes no more (No space left on device): results in it so far: "
        "11, make room and go on with --resume\n"
    )
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:11])
    monkeypatch.undo()
    assert cli.main(file_arguments(sample, requests, out, "--resume")) == 1
    assert out.read_bytes() == whole


def test_memory_is_bounded_by_the_batch(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first request lasts; all others would be read, and their results held, if nothing bounded them.
    with (tmp_path / "requests").open("w") as file:
        file.write('{"prompt": "We", "max_new_tokens": 60}\n')
        file.writelines('{"prompt": "a", "max_new_tokens": 1}\nno json\n' for _ in range(100))
    monkeypatch.setattr(jsonl_run, "WINDOW", 4)
    held: list[tuple[int, int]] = []
    admit: Callable[..., None] = jsonl_run.FileRun._admit

    def watched(self: jsonl_run.FileRun, line: Any) -> None:
        admit(self, line)
        held.append((len(self._running), self._results.waiting))

    monkeypatch.setattr(jsonl_run.FileRun, "_admit", watched)
    out = tmp_path / "out"
    assert cli.main(file_arguments(sample, tmp_path / "requests", out)) == 1
    assert out.read_bytes().count(b"\n") == 201
    assert max(running for running, _ in held) == 2 * 3
    # Behind the bound on what waits there may still be what was running when it was reached.
    assert 4 * 3 <= max(waiting for _, waiting in held) <= 4 * 3 + 2 * 3


def test_the_rank_that_writes_is_killed_and_the_file_is_continued(
    sample: Path, requests: Path, whole: bytes, tmp_path: Path
) -> None:
    script, out = [sys.executable, HERE / "faulty_command.py", "0", "generating", "kill"], tmp_path / "out"
    environment = {"PYTHONSAFEPATH": "", "FAULT_TIME": str(tmp_path / "time"), "FAULT_STEP": "12"}
    done = command(*script, *file_arguments(sample, requests, out, "--tp", "2"), env=environment)
    assert time.time() - float((tmp_path / "time").read_text()) < 30
    assert done.returncode == 1
    assert done.stderr == (
        "tp-mamba generate: error: rank 0 was killed by SIGKILL; the other ranks have been ended\n"
    )
    left = out.read_bytes()
    assert 0 < left.count(b"\n") < 20
    assert whole.startswith(left)
    assert cli.main(file_arguments(sample, requests, out, "--resume")) == 1
    assert out.read_bytes() == whole


def test_requests_that_begin_alike_say_the_same_from_kept_states(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, requests = "We are accounted poor citizens, the patricians good. " * 8, tmp_path / "in.jsonl"
    lines = [
        json.dumps({"prompt": shared + end, "max_new_tokens": 4}) for end in ("What", "He", "Speak", "We")
    ]
    requests.write_text("\n".join(lines))
    plain, kept = tmp_path / "plain.jsonl", tmp_path / "kept.jsonl"
    assert cli.main(file_arguments(sample, requests, plain)) == 0
    capsys.readouterr()
    options = ("--enable-prefix-caching", "--mamba-block-size", "64")
    assert cli.main(file_arguments(sample, requests, kept, *options)) == 0
    assert kept.read_bytes() == plain.read_bytes()
    tokens = len(load_tokenizer(sample).encode(shared).ids)
    said = capsys.readouterr().out
    reused = int(said.split(" prompt tokens from kept states")[0].split()[-1].replace(",", ""))
    assert 2.5 * tokens < reused < 3 * tokens + 3


def test_results_carry_the_logprobs_that_a_line_asks_for(sample: Path, tmp_path: Path) -> None:
    asked = ({"logprobs": 2}, {"prompt_logprobs": 1, "prompt_logprobs_start": 2}, {})
    lines = [{"prompt_token_ids": [5, 6, 7, 8], "max_new_tokens": 3, **each} for each in asked]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(file_arguments(sample, tmp_path / "in", tmp_path / "out")) == 0
    new, of_prompt, none = (json.loads(line) for line in (tmp_path / "out").read_text().splitlines())
    assert [each["token_id"] for each in new["logprobs"]] == new["token_ids"] == none["token_ids"]
    for each in new["logprobs"]:
        assert each["top"][0] == {"token_id": each["token_id"], "logprob": each["logprob"]}  # it is greedy
        assert each["top"][1]["logprob"] < each["logprob"] <= 0
    assert [each["token_id"] for each in of_prompt["prompt_logprobs"]] == [7, 8]
    assert "logprobs" not in none
    assert "prompt_logprobs" not in new


def test_a_line_may_ask_for_samples(sample: Path, tmp_path: Path) -> None:
    line = {
        "prompt_token_ids": list(range(40)),
        "max_new_tokens": 4,
        "temperature": 1e5,
    }  # its logits lie far apart
    lines = [{**line, "n": 3}, line]
    (tmp_path / "in").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert cli.main(file_arguments(sample, tmp_path / "in", tmp_path / "out")) == 0
    three, one = (json.loads(each) for each in (tmp_path / "out").read_text().splitlines())
    assert len({tuple(each["token_ids"]) for each in three["samples"]}) == 3
    assert three["samples"][0] == {name: three[name] for name in three["samples"][0]}
    assert "samples" not in one
