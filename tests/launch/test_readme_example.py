"""The README's library example, run as a user would run it: by python alone and by torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def example(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with the sample checkpoint in place of the hub's, and the CPU in place of a GPU."""
    code, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert code.count('"state-spaces/mamba-130m-hf"') == 2
    script = tmp_path_factory.mktemp("readme") / "example.py"
    script.write_text(code.replace("state-spaces/mamba-130m-hf", str(sample)))
    return script


@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]]
)
def test_the_library_example(example: Path, launcher: list[str]) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    # Twice: a process group left to the interpreter's end aborted about one run in three.
    for _ in range(2 if launcher else 1):
        done = subprocess.run(
            [sys.executable, *launcher, str(example)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), "rank 0 prints the text"
