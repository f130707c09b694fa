"""A state file says whose it is, and is on the disk before it has its name."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_mamba.checkpoint import atomic
from tp_mamba.model import MambaForCausalLM
from tp_mamba.models.config import MambaConfig
from tp_mamba.state.cache import MambaCache

CONFIG = MambaConfig(
    model_type="mamba", hidden_size=6, intermediate_size=14, num_hidden_layers=2, state_size=4,
    conv_kernel=3, time_step_rank=2, vocab_size=20,
)  # fmt: skip


def cache_of(**changes: object) -> tuple[MambaCache, int]:
    config = replace(CONFIG, **changes)
    cache = MambaForCausalLM(config, device="cpu").new_cache(1)
    return cache, cache.allocate()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cache, slot = cache_of()
    cache.ssm_states.fill_(3)
    cache.save(tmp_path / "state", slot)
    return tmp_path / "state"


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_epsilon": 1e-3},
        {"vocab_size": 24},
        {"hidden_size": 8},
        {"time_step_rank": 3},
        {"model_type": "falcon_mamba", "mixer_norm": "weightless"},
    ],
    ids=str,
)
def test_a_state_of_the_same_shape_of_another_model_is_refused(saved: Path, changes: dict) -> None:
    cache, slot = cache_of(**changes)
    with pytest.raises(
        ValueError, match=r"is the state of another model .*hidden_size=6.*; this one is .*: load"
    ):
        cache.load(saved, slot)
    assert not cache.ssm_states.any()


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float32}, {"eos_token_ids": (3, 4)}, {"usable_vocab_size": 19}], ids=str
)
def test_what_changes_no_state_is_no_reason_to_refuse(saved: Path, changes: dict) -> None:
    cache, slot = cache_of(**changes)
    cache.load(saved, slot)
    assert (cache.ssm_states == 3).all()


def test_a_file_of_the_version_that_named_no_model_is_refused(saved: Path) -> None:
    save_file(load_file(saved), saved, metadata={"format": "tp-mamba state 1"})
    cache, slot = cache_of()
    with pytest.raises(ValueError, match="did not write down whose state it is: save it again"):
        cache.load(saved, slot)


def test_it_is_flushed_before_it_takes_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, slot = cache_of()
    steps: list[str] = []
    fsync, move = os.fsync, os.replace

    def flush(file: int) -> None:
        steps.append("flush folder" if Path(f"/proc/self/fd/{file}").resolve() == tmp_path else "flush file")
        fsync(file)

    def rename(source: Path, target: Path) -> None:
        steps.append("rename")
        move(source, target)

    monkeypatch.setattr(atomic.os, "fsync", flush)
    monkeypatch.setattr(atomic.os, "replace", rename)
    cache.save(tmp_path / "state", slot)
    assert steps == ["flush file", "rename", "flush folder"]
