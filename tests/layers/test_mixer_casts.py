"""A mixer that is cast after it was built: A, D and the dt bias stay in at least float32, and it computes."""

from __future__ import annotations

import pytest
import torch

from tp_mamba import MambaCache
from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.mixer import MambaMixer
from tp_mamba.parallel.sharding import sharded_tensors


def make_mixer(dtype: torch.dtype = torch.float32) -> MambaMixer:
    torch.manual_seed(0)
    mixer = MambaMixer(6, 4, 3, 10, 2, True, True, True, prefix="m", dtype=dtype)
    for tensor in sharded_tensors(mixer):
        full = torch.rand(tensor.shard.shape, generator=torch.Generator().manual_seed(1))
        tensor.param.weight_loader(tensor.param, full)
    return mixer


@pytest.mark.parametrize("start", [torch.float32, torch.float64])
@pytest.mark.parametrize("cast", ["float", "double", "half", "bfloat16"])
def test_a_cast_mixer_is_one_built_so(cast: str, start: torch.dtype) -> None:
    mixer = getattr(make_mixer(start), cast)()
    dtype = {"float": torch.float32, "double": torch.float64, "half": torch.float16}.get(cast, torch.bfloat16)
    built = make_mixer(dtype)
    assert mixer.dtype == dtype
    assert mixer.get_state_dtype() == built.get_state_dtype()
    for ours, theirs in zip(sharded_tensors(mixer), sharded_tensors(built), strict=True):
        assert ours.param.dtype == theirs.param.dtype, ours.name
        assert ours.param.dtype.itemsize >= (4 if ours.shard.wide else 2)
    assert mixer.A_log.dtype == built.A_log.dtype
    if start == torch.float32 or dtype != torch.float64:  # else it was rounded to float32 when it was loaded
        for ours, theirs in zip(sharded_tensors(mixer), sharded_tensors(built), strict=True):
            torch.testing.assert_close(ours.param, theirs.param, rtol=1e-6, atol=0)
    h = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    torch.testing.assert_close(mixer(h), built(h), rtol=1e-5, atol=1e-5)


def test_casting_there_and_back_keeps_A_to_the_bit() -> None:
    mixer = make_mixer()
    A, D, bias = mixer.A.clone(), mixer.D.clone(), mixer.dt_proj.bias.clone()
    mixer.half().float()
    assert torch.equal(mixer.A, A)
    assert torch.equal(mixer.D, D)
    assert torch.equal(mixer.dt_proj.bias, bias)


def test_a_cast_mixer_decodes_from_a_new_cache() -> None:
    mixer = make_mixer().bfloat16()
    cache = MambaCache([mixer], 1)
    batch = MambaMetadataBuilder("cpu").build(decode_slots=[cache.allocate()])
    assert mixer(torch.ones(1, 6, dtype=torch.bfloat16), batch, cache.layer(0)).dtype == torch.bfloat16


def test_inputs_of_the_dtype_before_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"m: got hidden states in torch.float32, the parameters are in torch.float16"
    ):
        make_mixer().half()(torch.zeros(2, 6))
