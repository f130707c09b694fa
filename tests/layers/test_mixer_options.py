"""What the mixer refuses, and the names that readers of vLLM's mixer expect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tp_mamba.batch import MambaMetadataBuilder
from tp_mamba.mixer import MambaMixer
from tp_mamba.options import CacheConfig
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.state.cache import MambaCache

SIZES: dict[str, Any] = {
    "hidden_size": 6,
    "ssm_state_size": 4,
    "conv_kernel_size": 3,
    "intermediate_size": 10,
    "time_step_rank": 2,
    "use_conv_bias": True,
    "use_bias": False,
    "use_rms_norm": False,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conv_kernel_size": 5},
            "layer.mixer.conv1d has a convolution width K of 5 but K must be 2 to 4",
        ),
        ({"ssm_state_size": 300}, "layer.mixer has a state size N of 300 but N must be 1 to 256"),
        ({"activation": "gelu"}, "layer.mixer has the unknown activation 'gelu'"),
        ({"time_step_rank": 0}, "layer.mixer: size R is 0, it must be a positive integer"),
        ({"hidden_size": 6.0}, "layer.mixer: size H is 6.0, it must be a positive integer"),
        ({"tp": 4}, "got tp=4: pass a TensorParallel"),
        (
            {"dtype": torch.int8},
            "layer.mixer: dtype=torch.int8 is not supported: use one of float32, bfloat16",
        ),
        ({"dtype": "half-float"}, "layer.mixer: dtype='half-float' is not supported"),
        ({"tp": TensorParallel.virtual(0, 11)}, "has 10 channels, too few for 11 tensor-parallel ranks"),
        ({"is_lora_enabled": True}, "is_lora_enabled is set but adapters are not available yet"),
        (
            {"cache_config": CacheConfig(mamba_block_size=0)},
            "mamba_block_size is 0: it is a number of tokens",
        ),
        ({"cache_config": CacheConfig(mamba_block_size=16)}, "mamba_block_size is 16"),
        (
            {"cache_config": CacheConfig(mamba_ssm_cache_dtype="int8")},
            "mamba_ssm_cache_dtype='int8' is not supported: use one of",
        ),
    ],
)
def test_constructor_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaMixer(**{**SIZES, "prefix": "layer.mixer", **change})


@pytest.fixture
def mixer() -> MambaMixer:
    torch.manual_seed(0)
    return MambaMixer(**SIZES, prefix="m")


def test_forward_refuses(mixer: MambaMixer) -> None:
    with pytest.raises(
        ValueError, match=r"m: got hidden states of shape \[4, 7\], expected packed \[T, 6\] or dense"
    ):
        mixer(torch.zeros(4, 7))
    with pytest.raises(
        ValueError, match=r"got hidden states in torch.float64, the parameters are in torch.float32"
    ):
        mixer(torch.zeros(4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="1 decode rows but no state was passed"):
        mixer(torch.zeros(1, 6), MambaMetadataBuilder("cpu").build(decode_slots=[0]))
    prefill = MambaMetadataBuilder("cpu").build(
        prefill_slots=[0], prefill_lengths=[5], has_initial_states=[False]
    )
    with pytest.raises(ValueError, match="has 4 rows but the metadata describes 5 tokens"):
        mixer(torch.zeros(4, 6), prefill, MambaCache([mixer], 1).layer(0))
    with pytest.raises(ValueError, match="slots are named but no state was passed"):
        mixer(torch.zeros(5, 6), prefill)
    cache = MambaCache([mixer], 2)
    with pytest.raises(ValueError, match="the batch names slot 2 of a state with 2 slots"):
        mixer(torch.zeros(1, 6), MambaMetadataBuilder("cpu").build(decode_slots=[2]), cache.layer(0))
    mixer.A = torch.nn.Parameter(mixer.A.bfloat16(), requires_grad=False)
    with pytest.raises(ValueError, match=r"A is in torch.bfloat16 but exp needs at least float32"):
        mixer(torch.zeros(4, 6))


def test_dense_and_packed_agree_with_and_without_state(mixer: MambaMixer) -> None:
    h = torch.randn(3, 7, 6)
    dense = mixer(h)
    assert dense.shape == h.shape
    torch.testing.assert_close(mixer(h[1]), dense[1], rtol=1e-5, atol=1e-6)

    cache = MambaCache([mixer], 3)
    slots = [cache.allocate() for _ in range(3)]
    builder = mixer.get_attn_backend()("cpu")

    def batch(length: int, initial: bool) -> Any:
        return builder.build(
            prefill_slots=slots, prefill_lengths=[length] * 3, has_initial_states=[initial] * 3
        )

    first = mixer(h[:, :4].contiguous(), batch(4, False), cache.layer(0))
    rest = mixer(h[:, 4:].contiguous(), batch(3, True), cache.layer(0))
    torch.testing.assert_close(torch.cat([first, rest], dim=1), dense, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_gives_an_empty_result(mixer: MambaMixer) -> None:
    for shape in ((0, 6), (2, 0, 6), (0, 3, 6)):
        assert mixer(torch.zeros(shape)).shape == shape


def test_names_known_from_vllm(mixer: MambaMixer) -> None:
    assert mixer.mamba_type == "mamba1"
    names = (
        "in_proj",
        "conv1d",
        "x_proj",
        "dt_proj",
        "A",
        "D",
        "out_proj",
        "dt_layernorm",
        "b_layernorm",
        "c_layernorm",
    )
    assert all(hasattr(mixer, name) for name in names)
    assert all(hasattr(p, "weight_loader") for p in mixer.parameters())


def test_a_changed_A_is_what_gets_saved(mixer: MambaMixer) -> None:
    A_log = torch.rand(10, 4)
    mixer.A.weight_loader(mixer.A, A_log)
    assert torch.equal(mixer.read_shard("A"), A_log), "what was loaded, to the bit"
    mixer.A.mul_(2)
    torch.testing.assert_close(mixer.read_shard("A"), A_log + torch.tensor(2.0).log(), rtol=1e-6, atol=1e-6)


def test_initial_values_are_those_of_the_published_models() -> None:
    mixer = MambaMixer(**{**SIZES, "intermediate_size": 4096})
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.999 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1 * 1.001
    torch.testing.assert_close(mixer.A[0], -torch.arange(1.0, 5.0), rtol=1e-6, atol=0)
    assert (mixer.D == 1).all()
    assert mixer.dt_proj.weight.abs().max() <= 2**-0.5
