"""Servers that last for a session, and the model without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from server_process import EXAMPLE, MODEL, TEMPLATE, Oracle, ServerProcess

Servers = Callable[[int], ServerProcess]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example with a chat template beside it."""
    folder = tmp_path_factory.mktemp("served") / MODEL
    folder.mkdir()
    for path in EXAMPLE.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def servers(chat_model: Path) -> Iterator[Servers]:
    """``servers(n)``: a server over n ranks, started when first asked for, and again when it was ended."""
    running: dict[int, ServerProcess] = {}

    def get(size: int) -> ServerProcess:
        if size not in running or not running[size].alive:
            running[size] = ServerProcess(
                chat_model, size, "--max-queue", "400", "--max-tokens", "2000", "--drain-seconds", "3"
            )
        return running[size]

    yield get
    for server in running.values():
        server.kill()


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def server(request: pytest.FixtureRequest, servers: Servers) -> ServerProcess:
    """A server over one rank, and over two."""
    return servers(request.param)


@pytest.fixture
def server_of_one(servers: Servers) -> ServerProcess:
    """A server over one rank."""
    return servers(1)


@pytest.fixture(scope="session")
def oracle(chat_model: Path) -> Iterator[Oracle]:
    """The model in this process, computing as a rank does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Oracle(chat_model)
    torch.set_num_threads(threads)
