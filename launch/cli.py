"""The ``tp-mamba`` command: picks a verb, reports an error in one sentence, sets the exit status.

Exit status: 0 done, 1 failed (or a comparison above its tolerance), 2 wrong usage, 128 + signal when stopped.
A verb is a module ``tp_mamba.launch.verbs.<verb>`` with

* ``HELP``, one line, and ``EXAMPLES``, lines to type;
* ``USES_RANKS``: whether ``run`` wants ``args.tp`` ranks, or runs once, whatever ``--tp`` means to it;
* ``count_ranks(args)``, where it wants another number of them;
* ``ENDS_ITSELF``, true where rank 0 ends in its own time when a signal asks for it, or when another rank has ended;
* ``add_arguments(parser)``, which imports nothing heavy;
* ``prepare(args)``, run once before any rank starts: reads prompts, refuses what cannot work;
* ``run(args, tp)``, the work, on every rank; its result is the exit status.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from tp_mamba.launch.arguments import add_common
from tp_mamba.launch.console import OutputError, streams_that_take_all, tell, visible, write
from tp_mamba.launch.ranks.failures import LaunchError, Teller, UsageError, under_torchrun
from tp_mamba.launch.ranks.signals import StoppedError, ending_at_once
from tp_mamba.launch.ranks.start import leave_in_time, make_tensor_parallel, resolve_rank_count, start_ranks

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

VERBS = ("generate", "serve", "evaluate", "train", "export", "verify", "plan", "info", "shard", "merge")
ONCE = frozenset({"export", "plan", "info", "shard", "merge"})
"""Verbs that compute nothing on ranks: of those that torchrun has started, rank 0 runs them alone."""

READER_LEFT = 128 + signal.SIGPIPE
"""Exit status where nobody reads stdout any more (`| head`): there is nothing to say."""

DESCRIPTION = (
    "Run or train a Mamba-1 checkpoint tensor-parallel, over the GPUs or CPU cores of one machine or many."
)

EPILOG = """\
examples:
  tp-mamba generate ./mamba-130m-hf --prompt "The sea"            one process
  tp-mamba generate ./mamba-2.8b-hf --tp 4 --prompt "The sea"     four ranks of this machine
  tp-mamba serve ./mamba-2.8b-hf --tp 2 --port 8000               an endpoint in the shape of OpenAI's
  tp-mamba plan ./mamba-2.8b-hf --tp 8                            what each rank would hold, without weights
  tp-mamba verify ./mamba-130m-hf --tp 1,2,4                      are the logits right at every size?
  torchrun --nproc-per-node 4 -m tp_mamba.launch generate ./mamba-2.8b-hf --prompt "The sea"

`tp-mamba VERB --help` shows the arguments of a verb, and more examples.
"""


class Verb(Protocol):
    """What a module ``tp_mamba.launch.verbs.<verb>`` offers."""

    HELP: str
    EXAMPLES: str
    USES_RANKS: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def prepare(self, args: argparse.Namespace) -> None: ...
    def run(self, args: argparse.Namespace, tp: TensorParallel | None) -> int: ...


def main(argv: list[str] | None = None) -> int:
    """``tp-mamba``, alone or as a rank of torchrun's; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    verb = next((word for word in given if word in VERBS), "")
    with streams_that_take_all(verb):
        try:
            args = make_parser().parse_args(given)
        except BrokenPipeError:
            return READER_LEFT
        except OutputError as error:
            tell(verb, "error", str(error))
            return 1
        args.debug = args.debug or os.environ.get("TP_MAMBA_DEBUG") == "1"
        teller = Teller(args.verb)
        with teller.ended_with_a_word():
            return execute(args, teller)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command, with one sub-parser per verb."""
    raw = argparse.RawDescriptionHelpFormatter  # leaves the examples' lines as they are
    parser = _Parser(prog="tp-mamba", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        verb = _load(name)
        description, examples = f"{verb.HELP[0].upper()}{verb.HELP[1:]}.", f"examples:\n{verb.EXAMPLES}"
        one = verbs.add_parser(
            name, help=verb.HELP, description=description, epilog=examples, formatter_class=raw
        )
        verb.add_arguments(one)
        add_common(one)
        if name == "plan" and under_torchrun():
            one.set_defaults(tp=int(os.environ["WORLD_SIZE"]))
    return parser


def execute(args: argparse.Namespace, teller: Teller) -> int:
    """Run the verb that ``args`` name, turning every error into one sentence on stderr and a status."""
    failed = True
    try:
        status = run_verb(args)
        failed = False
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except StoppedError as stopped:
        return 128 + stopped.signum
    except Exception as error:
        name = error.failure.error if isinstance(error, LaunchError) else type(error).__name__
        if name == "BrokenPipeError":
            return READER_LEFT
        teller.tell(error, about=args.checkpoint or args.out, debug=args.debug)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        if failed:
            leave_in_time()


def run_verb(args: argparse.Namespace) -> int:
    """Prepare, start ranks if the verb and ``--tp`` want several, and work; returns the exit status."""
    if args.verb in ONCE and under_torchrun() and os.environ["RANK"] != "0":
        return 0
    verb = _load(args.verb)
    with ending_at_once():
        verb.prepare(args)
        size = _count_ranks(verb, args)
        import_module("tp_mamba.model")
    if size > 1 and not under_torchrun():
        ends_itself = getattr(verb, "ENDS_ITSELF", False)
        return int(start_ranks(run_rank, args, size=size, ends_itself=ends_itself))
    return run_rank(args) if verb.USES_RANKS else verb.run(args, None)


def run_rank(args: argparse.Namespace) -> int:
    """One rank's part of a verb: join the others and work."""
    with streams_that_take_all(args.verb):
        return _load(args.verb).run(args, make_tensor_parallel(args.device, args.backend))


def _count_ranks(verb: Verb, args: argparse.Namespace) -> int:
    if not verb.USES_RANKS:
        return 1
    count = getattr(verb, "count_ranks", None)
    return resolve_rank_count(args.tp, args.device) if count is None else int(count(args))


def _load(name: str) -> Verb:
    return cast(Verb, import_module(f"tp_mamba.launch.verbs.{name}"))


class _Parser(argparse.ArgumentParser):
    """Prints through the console, which says what became of it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        write(f"tp-mamba {version('tp-mamba')}\n")
        parser.exit()
