"""Kernels are tested with the launches that their launchers describe, not with those remembered of other tests."""

from __future__ import annotations

from typing import Any

import pytest

from tp_mamba.kernels.common import launches


class Forgetful(dict[Any, Any]):
    """A dict that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def launches_are_described_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that replaces a plan or a kernel gets what it asked for, also where a GPU has seen the form before."""
    monkeypatch.setattr(launches, "_remembered", Forgetful())
