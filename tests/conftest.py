"""Shared fixtures; the first statement keeps this checkout's folders off the import path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the checkout on sys.path, where the folder kernels/ would stand in for a published
# package of that name. The installed tp_mamba must be found instead.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]
# What the kernels' tests share serves those of the mixer too.
sys.path.append(str(ROOT / "tests" / "kernels"))

from collections.abc import Callable, Iterator  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from rank_pool import RankPool, SingleRank  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are, and what only holds with the compilers of constraints.txt."""
    gpus = torch.cuda.device_count()
    other = other_toolchain()
    for item in items:
        need = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
        if gpus < need:
            item.add_marker(pytest.mark.skip(reason=f"needs {need} GPU(s), found {gpus}"))
        if other and item.get_closest_marker("pinned_toolchain"):
            item.add_marker(pytest.mark.skip(reason=other))


def other_toolchain() -> str | None:
    """Why tests of compiled code are skipped: torch or Triton is not that of constraints.txt. None where both are."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for name in ("torch", "triton"):
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = "absent"
        if found != pins[name]:
            return f"counts what {name} {pins[name]} compiles to, {name} here is {found}"
    return None


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool | SingleRank]]:
    """``ranks(n)``: n gloo ranks on the CPU, started when first asked for and kept for the session."""
    pools: dict[int, RankPool | SingleRank] = {1: SingleRank()}

    def get(size: int) -> RankPool | SingleRank:
        if size not in pools:
            pools[size] = RankPool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()
