"""``tp-mamba serve``: completions over HTTP, on one rank or many."""

from __future__ import annotations

import argparse
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tp_mamba.launch.arguments import add_checkpoint, port_number, positive_int, positive_seconds
from tp_mamba.launch.console import print_json, tell, write
from tp_mamba.launch.engine_arguments import (
    ENGINE_ARGUMENTS,
    PREFIX_ARGUMENTS,
    add_engine_arguments,
    add_tokenizer,
    check_prefix_caching,
    place_ranks,
    resolve_checkpoint,
)
from tp_mamba.launch.ranks.failures import UsageError

if TYPE_CHECKING:
    from tp_mamba.parallel.group import TensorParallel

USES_RANKS = True
ENDS_ITSELF = True
HELP = "answer requests over HTTP, as OpenAI's API does"
EXAMPLES = """\
  tp-mamba serve ./mamba-130m-hf --port 8000
  tp-mamba serve ./falcon-mamba-7b-instruct --tp 2 --dtype bfloat16 --enable-prefix-caching
  TP_MAMBA_API_KEY=secret tp-mamba serve ./mamba-130m-hf --host 0.0.0.0 --port 8000
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The sea", "max_tokens": 32}'
"""
KEY = "TP_MAMBA_API_KEY"
"""The environment variable with the key that requests have to give."""

LOCAL_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_checkpoint(parser)
    add_tokenizer(parser)
    http = parser.add_argument_group(f"HTTP (the environment's {KEY} is the key that requests have to give)")
    http.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    http.add_argument(
        "--port",
        type=port_number,
        default=8000,
        metavar="P",
        help="default 8000; 0: one that is free, printed",
    )
    http.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the model in requests (default: the checkpoint's last name)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-queue",
        type=positive_int,
        default=256,
        metavar="N",
        help="texts that may wait for a slot; more are told to come back (default 256)",
    )
    limits.add_argument(
        "--max-tokens",
        type=positive_int,
        default=4096,
        metavar="N",
        help="new tokens that a request may ask for (default 4096)",
    )
    limits.add_argument(
        "--max-request-bytes",
        type=positive_int,
        default=4 * 2**20,
        metavar="N",
        help="bytes of a request (default 4 MiB)",
    )
    limits.add_argument(
        "--request-seconds",
        type=positive_seconds,
        default=600.0,
        metavar="S",
        help="from a request's arrival to the end of its answer (default 600)",
    )
    limits.add_argument(
        "--drain-seconds",
        type=positive_seconds,
        default=30.0,
        metavar="S",
        help="after SIGTERM: for answers that have begun to be finished, the rest is cut (default 30)",
    )
    add_engine_arguments(parser, batch_size="texts that are made at a time (default 256)")


def prepare(args: argparse.Namespace) -> None:
    """Refuse what cannot be served, before any rank starts."""
    missing = [name for name in ("fastapi", "uvicorn", "pydantic") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{missing[0]} is not installed: pip install 'tp-mamba[serve]'")
    check_prefix_caching(args)
    if not (os.environ.get(KEY) or "x").isascii() or os.environ.get(KEY, "x").strip() == "":
        raise UsageError(
            f"{KEY} is empty or has characters that no HTTP header takes: use letters and digits"
        )
    size = place_ranks(args)
    if args.served_model_name is None:
        given = Path(args.checkpoint)
        args.served_model_name = given.resolve().name if given.exists() else args.checkpoint
    resolve_checkpoint(args, size)


def run(args: argparse.Namespace, tp: TensorParallel) -> int:
    """Load this rank's part of the model; rank 0 serves, the others follow it."""
    if tp.rank > 0:
        # A supervisor may send it to every process. Rank 0 finishes its answers and then lets the others go.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
    import asyncio

    from tp_mamba.engine.engine import Engine
    from tp_mamba.engine.leader import Leader, follow
    from tp_mamba.launch.agreement import agree_on_arguments
    from tp_mamba.launch.loading import cache_config_of, describe, limits_before_loading, load_model
    from tp_mamba.launch.server.codec import load_codec
    from tp_mamba.launch.server.run import Session, Settings, listen
    from tp_mamba.launch.server.service import Limits

    agree_on_arguments(tp, args, (*ENGINE_ARGUMENTS, *PREFIX_ARGUMENTS))
    with tp.agreed():
        listener = listen(args.host, args.port) if tp.rank == 0 else None
    codec = load_codec(args, tp)
    limits = limits_before_loading(args, tp)
    model, _ = load_model(args, tp)
    report = describe(model)
    engine = Engine(model, codec.tokenizer, eager=args.eager, cache_config=cache_config_of(args), **limits)
    if listener is None:
        follow(engine, tp)
        return 0
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def announce() -> None:
        if args.host not in LOCAL_HOSTS and not os.environ.get(KEY):
            tell(args.verb, "note", f"{url} may be asked by anyone who reaches it: set {KEY} to want a key")
        if args.json:
            print_json({"url": url, "model": args.served_model_name, **report})
        else:
            where = f"{report['ranks']} x {report['device']}, {report['dtype']}"
            write(f"serving {args.served_model_name} at {url} ({where})\n")

    settings = Settings(
        model=args.served_model_name,
        limits=Limits(
            max_queue=args.max_queue,
            max_tokens=args.max_tokens,
            max_request_bytes=args.max_request_bytes,
            request_seconds=args.request_seconds,
        ),
        drain_seconds=args.drain_seconds,
        key=os.environ.get(KEY),
    )
    asyncio.run(Session(settings, codec, lambda: Leader(engine, tp), announce).run(listener))
    return 0
