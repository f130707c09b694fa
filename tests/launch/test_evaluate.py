"""``tp-mamba evaluate`` beside lm_eval's own ``hf`` model, on tasks made of local files, at several rank counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_mamba.engine.engine import Engine
from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch import cli
from tp_mamba.launch.evaluation.scoring import Scoring
from tp_mamba.launch.evaluation.texts import Texts, sampling_of
from tp_mamba.launch.verbs import evaluate
from tp_mamba.model import MambaForCausalLM
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.text.tokenizer import load_tokenizer

pytest.importorskip("lm_eval")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "shakespeare-mamba-hf"
MAX_LENGTH = 128
TASKS = ("our_choice", "our_rolling", "our_text")
CHOICES = [" the king", " the queen of England", " a horse", ", my lord, and nothing else"]
PASSAGES = [
    "First Citizen:\nBefore we proceed any further, hear me speak. What would you have me bring to",
    "KING RICHARD:\nNow is the winter of our discontent made glorious summer by this sun of",
    "O Romeo, Romeo, wherefore art thou Romeo? Deny thy father and refuse thy name, or love",
]
YAML = {
    "our_choice": """
task: our_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "our_rolling": """
task: our_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{whole}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "our_text": """
task: our_text
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "."], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": text, "choices": CHOICES, "answer": i % 4, "whole": f"{text} {CHOICES[i]}.\n{PASSAGES[0]}"}
        for i, text in enumerate(PASSAGES)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    for name, text in YAML.items():
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(
            text.lstrip() + files + "test_split: test\nmetadata: {version: 1}\n"
        )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with an end-of-text token that its tokenizer names, without which ``hf`` scores nothing."""
    folder = tmp_path_factory.mktemp("scored") / "checkpoint"
    shutil.copytree(EXAMPLE, folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (name,) = (token for token, id_ in vocabulary.items() if id_ == 0)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": name, "bos_token": name}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def by_hf(tasks: Path, checkpoint: Path) -> dict[str, Any]:
    """What lm_eval's own model says."""
    pytest.importorskip("accelerate")  # hf asks for it
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={checkpoint},dtype=float32,max_length={MAX_LENGTH}",
        device="cpu",
        batch_size=4,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )


def texts_of(checkpoint: Path) -> Texts:
    return Texts(load_tokenizer(checkpoint), str(checkpoint), (0,))


def arguments(checkpoint: Path, tasks: Path, *extra: str) -> list[str]:
    given = ["--tasks", ",".join(TASKS), "--include-path", str(tasks), "--max-length", str(MAX_LENGTH)]
    return ["evaluate", str(checkpoint), *given, "--dtype", "float32", "--device", "cpu", *extra]


def _on_ranks(tp: TensorParallel, argv: list[str]) -> int:
    return evaluate.run(cli.make_parser().parse_args(argv), tp)


def _same(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of a loglikelihood; everything else is equal."""
    worst = 0.0
    for name in TASKS:
        pairs = zip(found["samples"][name], expected["samples"][name], strict=True)
        for ours, theirs in pairs:
            assert ours["doc_id"] == theirs["doc_id"]
            for our, their in zip(ours["resps"], theirs["resps"], strict=True):
                if name == "our_text":
                    assert our[0] == their[0]
                    continue
                our, their = our[0], their[0]
                if name == "our_choice":
                    assert our[1] == their[1], "greedy"
                    our, their = our[0], their[0]
                worst = max(worst, abs(float(our) - float(their)))
        for metric in ("acc,none", "acc_norm,none", "exact_match,none"):
            assert found["results"][name].get(metric) == expected["results"][name].get(metric)
    return worst


@pytest.mark.parametrize("size", [1, 2, 3])
def test_scores_are_those_of_hf(
    ranks: Any, size: int, checkpoint: Path, tasks: Path, by_hf: dict[str, Any], tmp_path: Path
) -> None:
    argv = arguments(checkpoint, tasks, "--output", str(tmp_path / "out.json"), "--max-batch-size", "4")
    assert ranks(size).run(_on_ranks, argv, timeout=300) == [0] * size
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["model"]["ranks"] == size
    assert _same(found, by_hf) < 1e-4
    texts = [sample["resps"][0][0] for sample in found["samples"]["our_text"]]
    assert all(texts)
    assert "." not in "".join(texts)


def test_the_command_counts_a_context_once(
    checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted, forward = [], MambaForCausalLM.forward_hidden

    def counting(self: Any, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        counted.append(input_ids.numel())
        return forward(self, input_ids, *args)

    monkeypatch.setattr(MambaForCausalLM, "forward_hidden", counting)
    argv = arguments(checkpoint, tasks, "--tasks", "our_choice", "--json")
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n-samples"]["our_choice"]["effective"] == 3
    assert 0 <= report["results"]["our_choice"]["acc,none"] <= 1
    texts = texts_of(checkpoint)
    ends = sum(1 + len(texts.encode(choice)) for choice in CHOICES)
    assert sum(counted) == sum(len(texts.encode(text)) - 1 + ends for text in PASSAGES)


def test_loglikelihoods_against_float64(checkpoint: Path) -> None:
    texts, model = texts_of(checkpoint), MambaForCausalLM.from_pretrained(checkpoint, dtype="float32")
    exact = MambaForCausalLM.from_pretrained(checkpoint, dtype="float64")
    pairs = [(texts.encode(PASSAGES[i % 2]), texts.encode(choice)) for i, choice in enumerate(CHOICES)]
    with Engine(model, max_batch_size=3) as engine:
        scoring = Scoring(engine)
        with scoring.kept_alive(0.001):  # whose steps change nothing
            found = scoring.loglikelihoods(pairs)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([context + continuation])
        logits = exact(ids)[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).sum().item()
        plain = model(ids)[0, len(context) - 1 : -1].log_softmax(-1)
        error = abs(plain.gather(1, ids[0, len(context) :, None]).sum().item() - expected)
        assert abs(total - expected) <= max(2 * error, 1e-5)
        assert greedy == bool((logits.argmax(-1) == ids[0, len(context) :]).all())


def test_what_lm_eval_registers_and_what_is_refused(
    checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    import tp_mamba.launch.evaluation.model as module

    made = get_model("tp_mamba").create_from_arg_string(
        f"pretrained={checkpoint},dtype=float32,max_length=40", {"batch_size": 3, "device": "cpu"}
    )
    assert isinstance(made, module.CheckpointModel)
    request = SimpleNamespace(args=("To be, or not to", {"until": ["e"], "max_gen_toks": 30}))
    (text,) = made.generate_until([request])
    assert "e" not in text
    assert len(made.loglikelihood_rolling([SimpleNamespace(args=("",))])) == 1
    with pytest.raises(
        ValueError, match="a task asks for 40 new tokens, and max_length is 40: give a larger"
    ):
        made.generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 40}))])
    made._scoring._engine.close()
    with pytest.raises(ValueError, match="generation_kwargs holds num_beams, which means nothing here"):
        sampling_of({"max_gen_toks": 3, "num_beams": 2}, [])
    drawn = sampling_of({"max_gen_toks": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.9}, ["", "x"])
    assert drawn == SamplingParams(max_new_tokens=3, temperature=0.5, top_p=0.9, stop=("x",))
    monkeypatch.setattr(  # lm_eval's own tasks are thousands of files
        "lm_eval.tasks.TaskManager", lambda **given: TaskManager(**{**given, "include_defaults": False})
    )
    assert cli.main(arguments(checkpoint, tasks, "--tasks", "no_such_task")) == 1
    assert "--tasks no_such_task: there is no such task" in capsys.readouterr().err
    assert cli.main(arguments(checkpoint, tasks, "--include-path", "/nowhere")) == 2
