"""The command that every benchmark is: options, then each case drawn, checked and timed, and the table."""

from __future__ import annotations

import argparse
import gc
import secrets
import sys
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.case import Case
from benchmarks.ceilings import H200, Ceilings, ceilings_of
from benchmarks.checking import worst_of_each
from benchmarks.environment import describe
from benchmarks.report import Row


def parser(name: str, doc: str | None, cases: Sequence[Case], samples: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share; ``doc`` is the module's docstring, ``samples`` the default."""
    listed = "\n".join(f"  {case.name}" for case in cases)
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        epilog=(
            "Before a case is timed its outputs are compared with float64; one that is wrong is reported without\n"
            "a time, and the exit status is then 1.\n\n"
            "columns:\n"
            "  median, min, p90  of the samples: half, none and nine in ten of them are below\n"
            "  limit, of limit   the least that this hardware allows, and its share of the median; the rates of a\n"
            "                    GPU other than an H200 are measured first\n"
            "  must, stretch     goals, met or missed; a GPU's are set for an H200, unless the head names another\n"
            "  vs PEER           how many times faster than the time recorded of that program (benchmarks/peers.py)\n"
            "  error             |output - float64| / |float64|\n\n"
            f"cases:\n{listed}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--cases", metavar="TEXT", default="", help="only those with TEXT in their name")
    made.add_argument(
        "--samples",
        metavar="N",
        type=positive,
        default=samples,
        help="how many to take of each case (default: %(default)s)",
    )
    made.add_argument(
        "--seed",
        metavar="N",
        type=int,
        help="of the random inputs; drawn and printed if not given. A case has the same inputs whichever others run",
    )
    made.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the results there, after every case"
    )
    made.add_argument(
        "--commit", metavar="ID", help="the code's commit, to be recorded where git cannot tell it"
    )
    return made


def positive(text: str) -> int:
    """A number of an option, at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number: give 1 or more")
    return int(text)


def choose(name: str, cases: Sequence[Case], part: str) -> list[Case]:
    """The cases with ``part`` in their name; says so if there are none."""
    chosen = [case for case in cases if part in case.name]
    if not chosen:
        print(
            f"--cases {part!r} is in no name of a case, such as {cases[0].name!r}: "
            f"python -m benchmarks.{name} --help lists them all",
            file=sys.stderr,
        )
    return chosen


def main(
    name: str, doc: str | None, cases: Sequence[Case], argv: Sequence[str] | None = None, *, samples: int = 50
) -> int:
    """Run one of the GPU's benchmarks from its command line; returns the exit status."""
    options = parser(name, doc, cases, samples).parse_args(argv)
    return run(name, cases, options, torch.device("cuda")) if has_gpu(name) else 2


def has_gpu(name: str) -> bool:
    """Whether torch finds a GPU; says so if not."""
    if torch.cuda.is_available():
        return True
    print(
        f"python -m benchmarks.{name} needs an NVIDIA GPU, and torch finds none here: "
        "run it on a machine that has one.",
        file=sys.stderr,
    )
    return False


@torch.no_grad()
def run(
    name: str,
    cases: Sequence[Case],
    options: argparse.Namespace,
    device: torch.device,
    *,
    goals: str = H200.hardware,
) -> int:
    """Check and time the chosen cases, whose goals are those of the GPU ``goals``.

    Returns:
        0, 1 if any failed, 2 for options that fit nothing.
    """
    chosen = choose(name, cases, options.cases)
    if not chosen:
        return 2
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    environment = describe(device, options.commit)
    if options.json is not None:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
        except OSError as failure:
            reason = f"({failure.strerror}): give a file"
            print(f"--json {options.json} cannot be written {reason}", file=sys.stderr)
            return 2
    ceilings = ceilings_of(device) if device.type == "cuda" else None
    print(headline(name, environment, seed, ceilings, goals))

    rows = []
    for case in chosen:
        rows.append(measure(case, seed, device, options.samples, ceilings))
        print(progress(rows[-1]), file=sys.stderr, flush=True)
        if options.json is not None:
            report.write_json(options.json, name, environment, ceilings, seed, rows, goals)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.show(rows)
    return 1 if any(row.failure is not None for row in rows) else 0


def measure(
    case: Case, seed: int, device: torch.device, samples: int, ceilings: Ceilings | None = None
) -> Row:
    """Draw the inputs of ``case``, check its outputs and, only if they are right, time it."""
    generator = torch.Generator(device).manual_seed((seed + zlib.crc32(case.name.encode())) % 2**63)
    try:
        workload = case.build(generator)
        errors = worst_of_each(workload.check())
        if not all(error.ok for error in errors):
            return Row.of(case, ceilings, errors=errors)
        taken = workload.measure(samples)
        return Row.of(case, ceilings, samples=taken, errors=errors, limit=workload.limit)
    except Exception as failure:  # the other cases are still worth their time
        traceback.print_exc()
        return Row.of(
            case, ceilings, failure=f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        )


def headline(
    name: str, environment: dict, seed: int, ceilings: Ceilings | None, goals: str = H200.hardware
) -> str:
    """What a table is of, in a few lines."""
    dirty = {True: " with changes", False: "", None: ""}[environment["dirty"]]
    parts = [
        environment["hardware"],
        f"{environment['threads']} threads" if environment["threads"] else f"driver {environment['driver']}",
        f"torch {environment['torch']}",
        f"Triton {environment['triton']}",
        f"commit {(environment['commit'] or 'unknown')[:12]}{dirty}",
        environment["date"],
        f"seed {seed}",
    ]
    lines = f"{name}: " + ", ".join(parts)
    if ceilings is not None:
        lines += f"\nThe limits of this GPU: {ceilings}."
        if ceilings.hardware != goals:
            lines += f" Goals and recorded times are those of an {goals}."
    return lines


def progress(row: Row) -> str:
    """One line a case, so that a run that is cut short has told what it found."""
    if row.failure is not None or row.median is None:
        return f"  {row.case}: FAILED: {row.failure}"
    errors = ", ".join(str(error) for error in row.errors)
    return f"  {row.case}: {report.figures(row.median)} {row.unit} (errors: {errors})"
