"""A sample checkpoint with random weights, written once a session by the script in examples/."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def sample_script() -> ModuleType:
    """The module examples/sample_checkpoint.py."""
    spec = importlib.util.spec_from_file_location("sample_checkpoint", EXAMPLES / "sample_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sample(sample_script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``sample_checkpoint.py --random`` leaves it."""
    folder = tmp_path_factory.mktemp("sample") / "checkpoint"
    tokenizer = sample_script.make_tokenizer(sample_script.TEXT.read_text())
    weights = sample_script.random_weights(torch.Generator().manual_seed(5))
    sample_script.write_checkpoint(folder, weights, tokenizer)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, in this test alone: how many there are decides bits of the library's products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT as in a program of a terminal, here and in whatever a test starts.

    ``nohup`` and a shell's background jobs hand it down ignored, and a process that starts so keeps it.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
