"""Slots: taken, given back, copied, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_mamba.mixer import MambaMixer
from tp_mamba.options import CacheConfig, ModelConfig
from tp_mamba.state.cache import MambaCache


def _mixers(
    dtype: torch.dtype = torch.float32, D: int = 14, cache_config: CacheConfig | None = None
) -> list[MambaMixer]:
    return [
        MambaMixer(6, 4, 3, D, 2, True, False, False, dtype=dtype, cache_config=cache_config)
        for _ in range(2)
    ]


def _fill(cache: MambaCache, slot: int) -> None:
    cache.conv_states[:, slot].normal_()
    cache.ssm_states[:, slot].normal_()


def test_shapes_dtypes_and_bytes() -> None:
    mixer = _mixers(torch.bfloat16)[0]
    assert mixer.get_state_shape() == ((14, 2), (14, 4))
    assert mixer.get_state_dtype() == (torch.bfloat16, torch.float32)
    cache = MambaCache(_mixers(torch.bfloat16), 3)
    assert cache.conv_states.shape == (2, 3, 14, 2)
    assert cache.ssm_states.shape == (2, 3, 14, 4)
    assert cache.layer(1).conv_state.stride(1) == 1, "channels are contiguous"
    assert cache.bytes_per_slot == 2 * 14 * (2 * 2 + 4 * 4)


def test_cache_config_sets_the_state_dtypes_and_model_config_the_parameters() -> None:
    options = CacheConfig(mamba_cache_dtype="float32", mamba_ssm_cache_dtype=torch.bfloat16)
    mixer = MambaMixer(
        6,
        4,
        3,
        14,
        2,
        True,
        False,
        False,
        model_config=ModelConfig(dtype=torch.bfloat16),
        cache_config=options,
    )
    assert mixer.get_state_dtype() == (torch.float32, torch.bfloat16)
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert {mixer.A.dtype, mixer.D.dtype, mixer.dt_proj.bias.dtype} == {torch.float32}


def test_allocate_gives_the_lowest_free_slot_zeroed_and_free_takes_it_back() -> None:
    cache = MambaCache(_mixers(), 3)
    assert [cache.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no free slot: all 3 are in use"):
        cache.allocate()
    _fill(cache, 1)
    cache.free(1)
    assert cache.num_free == 1
    assert cache.allocate() == 1
    assert not cache.conv_states[:, 1].any()
    assert not cache.ssm_states[:, 1].any()
    cache.free(1)
    with pytest.raises(ValueError, match=r"slot 1 is not in use \(slots in use: \[0, 2\]\)"):
        cache.free(1)


def test_copy_makes_an_independent_twin() -> None:
    cache = MambaCache(_mixers(), 3)
    source, target = cache.allocate(), cache.allocate()
    _fill(cache, source)
    cache.copy(source, target)
    assert torch.equal(cache.ssm_states[:, source], cache.ssm_states[:, target])
    assert torch.equal(cache.conv_states[:, source], cache.conv_states[:, target])
    cache.ssm_states[:, target].zero_()
    assert cache.ssm_states[:, source].any()
    assert not cache.ssm_states[:, 2].any()
    with pytest.raises(ValueError, match="slot 2 is not in use"):
        cache.copy(source, 2)


def test_save_and_load(tmp_path: Path) -> None:
    cache, other = MambaCache(_mixers(), 2), MambaCache(_mixers(), 5)
    slot = cache.allocate()
    _fill(cache, slot)
    cache.save(tmp_path / "state.safetensors", slot)
    other.allocate()
    target = other.allocate()
    other.load(tmp_path / "state.safetensors", target)
    assert torch.equal(other.conv_states[:, target], cache.conv_states[:, slot])
    assert torch.equal(other.ssm_states[:, target], cache.ssm_states[:, slot])
    assert list(tmp_path.iterdir()) == [tmp_path / "state.safetensors"], "nothing but the file is left behind"


def test_load_refuses_and_changes_nothing(tmp_path: Path) -> None:
    cache = MambaCache(_mixers(torch.bfloat16), 1)
    slot = cache.allocate()
    _fill(cache, slot)
    before = cache.ssm_states.clone()
    good = tmp_path / "good"
    cache.save(good, slot)

    def refused(path: Path, message: str, into: MambaCache = cache) -> None:
        with pytest.raises(ValueError, match=message):
            into.load(path, slot)

    refused(tmp_path / "absent", "absent cannot be read")
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-10])
    refused(tmp_path / "cut", "cut cannot be read .* it is missing or damaged")
    save_file(load_file(good), tmp_path / "foreign")
    refused(tmp_path / "foreign", "is not a state saved by MambaCache.save")
    wide = MambaCache(_mixers(torch.float32), 1)
    wide.allocate()
    wide.save(tmp_path / "wide", 0)
    refused(tmp_path / "wide", "conv_state is torch.float32, this cache keeps torch.bfloat16")
    larger = MambaCache(_mixers(torch.bfloat16, D=15), 1)
    larger.allocate()
    refused(good, r"conv_state holds \[2, 14, 2\], this model's state is \[2, 15, 2\]", larger)
    assert torch.equal(cache.ssm_states, before)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MambaCache(_mixers(), 1)
    slot = cache.allocate()
    cache.save(tmp_path / "state", slot)
    old = (tmp_path / "state").read_bytes()
    _fill(cache, slot)

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tp_mamba.state.files.save_file", full_disk)
    with pytest.raises(OSError, match=r"could not be written to .*state: .*No space left on device"):
        cache.save(tmp_path / "state", slot)
    assert (tmp_path / "state").read_bytes() == old
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    monkeypatch.undo()

    def refused(source: object, target: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tp_mamba.checkpoint.atomic.os.replace", refused)
    with pytest.raises(OSError, match=r"could not be written to .*state: .*Input/output error"):
        cache.save(tmp_path / "state", slot)
    assert (tmp_path / "state").read_bytes() == old, "the new file takes the old one's place in one move"
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    with pytest.raises(ValueError, match="the state cannot be saved as"):
        cache.save(tmp_path, slot)


def test_a_cache_needs_slots_and_layers() -> None:
    with pytest.raises(ValueError, match="got 0 slots for 2 layers"):
        MambaCache(_mixers(), 0)
