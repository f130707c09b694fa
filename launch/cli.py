"""The ``tp-mamba`` command: picks a verb, reports an error in one sentence, sets the exit status.

Exit status: 0 done, 1 failed (or a comparison above its tolerance), 2 wrong usage, 128 + signal when stopped.
A verb is a module ``tp_mamba.launch.<verb>`` with

* ``HELP``, one line, and ``EXAMPLES``, lines to type;
* ``add_arguments(parser)``, which imports nothing heavy;
* ``prepare(args)``, run once before any rank starts: reads prompts, refuses what cannot work;
* ``run(args, tp)``, the work, on every rank; its result is the exit status.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from tp_mamba.launch.arguments import add_common
from tp_mamba.launch.environment import (
    leave_process_group,
    make_tensor_parallel,
    resolve_rank_count,
    under_torchrun,
)
from tp_mamba.launch.failures import CONSEQUENCE_GRACE_S, StoppedError, UsageError, record_failure
from tp_mamba.launch.interrupts import ending_at_once
from tp_mamba.launch.last_word import LastWord
from tp_mamba.launch.telling import is_teller, tell

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

RAW = argparse.RawDescriptionHelpFormatter  # leaves the examples' lines as they are
VERBS = ("generate", "verify", "plan", "info", "shard", "merge")
ONCE = frozenset({"plan", "info", "shard", "merge"})
"""Verbs that compute nothing on ranks: of those that torchrun has started, rank 0 runs them alone."""

DESCRIPTION = "Run a Mamba-1 checkpoint tensor-parallel, over the GPUs or CPU cores of one machine or many."

EPILOG = """\
examples:
  tp-mamba generate ./mamba-130m-hf --prompt "The sea"            one process
  tp-mamba generate ./mamba-2.8b-hf --tp 4 --prompt "The sea"     four ranks of this machine
  tp-mamba plan ./mamba-2.8b-hf --tp 8                            what each rank would hold, without weights
  tp-mamba verify ./mamba-130m-hf --tp 1,2,4                      are the logits right at every size?
  torchrun --nproc-per-node 4 -m tp_mamba.launch.generate ./mamba-2.8b-hf --prompt "The sea"

`tp-mamba VERB --help` shows the arguments of a verb, and more examples.
"""


class Verb(Protocol):
    """What a module ``tp_mamba.launch.<verb>`` offers."""

    HELP: str
    EXAMPLES: str
    USES_RANKS: bool
    """``run`` wants ``args.tp`` ranks; otherwise it runs once, whatever ``--tp`` means to it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def prepare(self, args: argparse.Namespace) -> None: ...
    def run(self, args: argparse.Namespace, tp: TensorParallel | None) -> int: ...


def main(argv: list[str] | None = None) -> int:
    """The console script ``tp-mamba``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tp-mamba",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=RAW,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        verb = _load(name)
        _fill(verbs.add_parser(name, help=verb.HELP, formatter_class=RAW), name)
    return execute(parser.parse_args(argv))


def verb_main(name: str, argv: list[str] | None = None) -> int:
    """``python -m tp_mamba.launch.<name>``, alone or under torchrun; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"tp-mamba {name}", formatter_class=RAW)
    _fill(parser, name)
    parser.set_defaults(verb=name)
    return execute(parser.parse_args(argv))


def execute(args: argparse.Namespace) -> int:
    """Run the verb that ``args`` name, turning every error into one sentence on stderr and a status."""
    args.debug = args.debug or os.environ.get("TP_MAMBA_DEBUG") == "1"
    last_word = LastWord(args.verb)
    with last_word.on_sigterm():
        return _execute(args, last_word)


def _execute(args: argparse.Namespace, last_word: LastWord) -> int:
    failed = True
    try:
        status = _run(args)
        failed = False
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except StoppedError as stopped:
        return 128 + stopped.signum
    except Exception as error:
        if "BrokenPipeError" in (type(error).__name__, getattr(error, "error", "")):
            # The reader (`| head`) has left: nothing to say. Python would complain again on flushing at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        _report(error, args, last_word)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        leave_process_group(failed=failed)


def _run(args: argparse.Namespace) -> int:
    if args.verb in ONCE and under_torchrun() and os.environ["RANK"] != "0":
        return 0
    verb = _load(args.verb)
    with ending_at_once():
        verb.prepare(args)
        size = resolve_rank_count(args.tp, args.device) if verb.USES_RANKS else 1
        starts_ranks = size > 1 and not under_torchrun()
        import_module("tp_mamba.launch.ranks" if starts_ranks else "tp_mamba.model")
    if starts_ranks:
        from tp_mamba.launch.ranks import start_ranks

        return int(start_ranks(run_rank, args, size=size, debug=args.debug))
    return run_rank(args) if verb.USES_RANKS else verb.run(args, None)


def run_rank(args: argparse.Namespace) -> int:
    """One rank's part of a verb: join the others and work."""
    return _load(args.verb).run(args, make_tensor_parallel(args.device, args.backend))


def _report(error: Exception, args: argparse.Namespace, last_word: LastWord) -> None:
    rank = int(os.environ.get("RANK", "0"))
    with last_word.taken():
        failure = record_failure(error, rank, debug=args.debug)
        if args.debug:
            print(getattr(error, "trace", "") or failure.trace, file=sys.stderr, end="")
        tells = is_teller(failure)
        if tells:
            where = f"rank {rank}: " if rank and not failure.consequence else ""
            tell(args.verb, f"{where}{failure.sentence}")
    if failure.consequence or not tells:
        time.sleep(CONSEQUENCE_GRACE_S)


def _load(name: str) -> Verb:
    return cast(Verb, import_module(f"tp_mamba.launch.{name}"))


def _fill(parser: argparse.ArgumentParser, name: str) -> None:
    verb = _load(name)
    parser.description = f"{verb.HELP[0].upper()}{verb.HELP[1:]}."
    parser.epilog = f"examples:\n{verb.EXAMPLES}"
    verb.add_arguments(parser)
    if name == "plan" and under_torchrun():
        parser.set_defaults(tp=int(os.environ["WORLD_SIZE"]))
    add_common(parser)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"tp-mamba {version('tp-mamba')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
