"""``tp-mamba evaluate``: the score of a checkpoint on lm_eval's tasks, or on tasks of one's own."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_mamba.launch.arguments import add_checkpoint, positive_int
from tp_mamba.launch.console import print_json, tell, write
from tp_mamba.launch.engine_arguments import (
    ENGINE_ARGUMENTS,
    add_engine_arguments,
    add_tokenizer,
    place_ranks,
    resolve_checkpoint,
)
from tp_mamba.launch.ranks.failures import UsageError
from tp_mamba.quoting import shown_path

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = True
HELP = "score a checkpoint on tasks of lm_eval, EleutherAI's evaluation harness"
EXAMPLES = """\
  tp-mamba evaluate ./mamba-130m-hf --tasks lambada_openai,hellaswag
  tp-mamba evaluate ./falcon-mamba-7b --tp 2 --dtype bfloat16 --tasks gsm8k --num-fewshot 5 --output scores.json
  tp-mamba evaluate ./mamba-130m-hf --tasks my_task --include-path ./my_tasks --limit 100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_checkpoint(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,NAME,...",
        help="names or patterns; `lm_eval ls tasks` lists them",
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="where more tasks are, in lm_eval's YAML")
    parser.add_argument("--num-fewshot", type=_count, metavar="N", help="examples before each question")
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N questions of each task"
    )
    parser.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help="tokens of a window; what is longer is cut on its left (default: the tokenizer's, else 2048)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the scores, and each question with its answer, as JSON"
    )
    add_tokenizer(parser)
    add_engine_arguments(parser, batch_size="sequences that run at a time (default 256)", keeps_states=False)


def _count(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 0")
    return int(text)


def prepare(args: argparse.Namespace) -> None:
    """Refuse what cannot be scored, before any rank starts."""
    if find_spec("lm_eval") is None:
        raise UsageError("lm_eval is not installed: pip install 'tp-mamba[eval]'")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise UsageError(
            f"--include-path {shown_path(args.include_path)} is no folder: name the one with the tasks"
        )
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise UsageError(f"--output {shown_path(args.output)}: there is no such folder, make it first")
    resolve_checkpoint(args, place_ranks(args))


def run(args: argparse.Namespace, tp: TensorParallel) -> int:
    """Load this rank's part of the model; rank 0 asks and the others follow."""
    from tp_mamba.engine.engine import Engine
    from tp_mamba.engine.leader import Leader, follow
    from tp_mamba.launch.agreement import agree_on_arguments
    from tp_mamba.launch.evaluation.texts import Texts
    from tp_mamba.launch.loading import describe, limits_before_loading, load_model
    from tp_mamba.text.tokenizer import load_tokenizer

    agree_on_arguments(tp, args, ENGINE_ARGUMENTS)
    tasks: Any = None
    with tp.agreed():
        if tp.rank == 0:
            tasks = _find_tasks(args)
    place = args.tokenizer or args.checkpoint
    tokenizer = load_tokenizer(place, tp)
    limits = limits_before_loading(args, tp)
    model, _ = load_model(args, tp)
    report = describe(model)
    with tp.agreed():
        texts = Texts(tokenizer, place, model.config.eos_token_ids)
    engine = Engine(model, tokenizer, eager=args.eager, **limits)
    if tp.rank > 0:
        follow(engine, tp)
        return 0
    with Leader(engine, tp) as leader:
        results = _evaluate(args, leader, texts, tasks)
    _tell(args, results, report)
    return 0


def _find_tasks(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """lm_eval's index of tasks, and the names of those that are asked for."""
    from lm_eval.tasks import TaskManager

    asked = [name.strip() for name in args.tasks.split(",") if name.strip()]
    own = args.include_path
    manager = None if own is None else TaskManager(include_path=own, include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in asked):
        manager = TaskManager(include_path=own)  # reads thousands of files
    for name in asked:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"--tasks {name}: there is no such task, `lm_eval ls tasks` lists them; those of one's own are found "
                "with --include-path"
            )
    return manager, manager.match_tasks(asked)


def _evaluate(
    args: argparse.Namespace, leader: Any, texts: Any, tasks: tuple[Any, list[str]]
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from tp_mamba.launch.evaluation.model import ScoredModel
    from tp_mamba.launch.evaluation.scoring import Scoring

    scoring = Scoring(leader)
    with scoring.kept_alive():
        results: dict[str, Any] = simple_evaluate(
            model=ScoredModel(scoring, texts, args.max_length),
            tasks=tasks[1],
            task_manager=tasks[0],
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            log_samples=args.output is not None,
        )
    return results


def _tell(args: argparse.Namespace, results: dict[str, Any], report: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    scores = {name: plain[name] for name in names if name in plain}
    if args.output is not None:
        whole = {**scores, "samples": plain.get("samples"), "configs": plain.get("configs"), "model": report}
        Path(args.output).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        tell(args.verb, "note", f"wrote {shown_path(args.output)}")
    if args.json:
        print_json({**scores, **report})
    else:
        write(make_table(results) + "\n")
        if "groups" in results:
            write(make_table(results, "groups") + "\n")
