"""Metadata of packed batches against its definition written out row by row."""

import random

import pytest
import torch

from tp_mamba.batch import NULL_SLOT, MambaMetadataBuilder, split_batch_to_prefill_and_decode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_batch(rng: random.Random) -> dict:
    decodes, prefills = rng.randrange(5), rng.randrange(5)
    slots = rng.sample(range(40), decodes + prefills)
    return {
        "decode_slots": slots[:decodes],
        "prefill_slots": slots[decodes:],
        "prefill_lengths": [rng.randrange(1, 7) for _ in range(prefills)],
        "has_initial_states": [rng.random() < 0.5 for _ in range(prefills)],
        "num_padded_decodes": decodes + rng.randrange(4),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(8))
def test_every_row_is_described(seed: int, device: str) -> None:
    batch = random_batch(random.Random(seed))
    metadata = MambaMetadataBuilder(device).build(**batch)
    decodes, padded = len(batch["decode_slots"]), batch["num_padded_decodes"]
    lengths = [1] * padded + batch["prefill_lengths"]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    slots = batch["decode_slots"] + [NULL_SLOT] * (padded - decodes) + batch["prefill_slots"]
    initial = [True] * decodes + [False] * (padded - decodes) + batch["has_initial_states"]

    assert (metadata.num_decodes, metadata.num_padded_decodes) == (decodes, padded)
    assert (metadata.num_prefills, metadata.num_prefill_tokens) == (
        len(lengths) - padded,
        sum(lengths[padded:]),
    )
    assert metadata.num_tokens == sum(lengths)
    expected = {
        "query_start_loc": starts,
        "state_indices": slots,
        "has_initial_states": initial,
        "decode_state_indices": slots[:padded],
        "prefill_state_indices": slots[padded:],
        "prefill_query_start_loc": [start - padded for start in starts[padded:]],
        "prefill_has_initial_states": initial[padded:],
    }
    for name, values in expected.items():
        tensor = getattr(metadata, name)
        assert tensor.tolist() == values, name
        assert tensor.dtype == (torch.bool if "initial" in name else torch.int32)
        assert tensor.device.type == device
        assert tensor.data_ptr() % 16 == 0 or tensor.numel() == 0, (
            f"{name}: misaligned pointers recompile Triton kernels"
        )


def test_padding_is_optional_and_an_empty_batch_is_a_batch() -> None:
    build = MambaMetadataBuilder("cpu").build
    assert build(decode_slots=[3, 1]).num_padded_decodes == 2
    empty = build()
    assert empty.num_tokens == 0
    assert empty.query_start_loc.tolist() == empty.prefill_query_start_loc.tolist() == [0]


@pytest.mark.gpu
def test_building_on_a_gpu_waits_for_nothing() -> None:
    builder = MambaMetadataBuilder("cuda")
    builder.build(decode_slots=[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        builder.build(decode_slots=[0], prefill_slots=[1], prefill_lengths=[3], has_initial_states=[False])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seed", range(4))
def test_split_gives_views_of_each_kind(seed: int) -> None:
    batch = random_batch(random.Random(100 + seed))
    metadata = MambaMetadataBuilder("cpu").build(**batch)
    x_TD, gate_TD = torch.randn(2, metadata.num_tokens, 5).unbind(0)
    split = split_batch_to_prefill_and_decode(x_TD, gate_TD, metadata)
    cut = batch["num_padded_decodes"]
    assert torch.equal(split.hidden_states_BC_d, x_TD[:cut])
    assert torch.equal(split.hidden_states_BC_p, x_TD[cut:])
    assert torch.equal(split.gate_d, gate_TD[:cut])
    assert torch.equal(split.gate_p, gate_TD[cut:])
    for part in (split.hidden_states_BC_p, split.hidden_states_BC_d):
        assert part.untyped_storage().data_ptr() == x_TD.untyped_storage().data_ptr(), "a copy was made"
    assert split.state_indices_tensor_d.tolist() == metadata.state_indices.tolist()[:cut]
    assert split.state_indices_tensor_p.tolist() == batch["prefill_slots"]
    assert split.query_start_loc_p.tolist()[-1] == sum(batch["prefill_lengths"])
    assert split.has_initial_states_p.tolist() == batch["has_initial_states"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"prefill_slots": [0, 1], "prefill_lengths": [3], "has_initial_states": [False]},
            "got 2 prefill_slots, 1 prefill_lengths and 1 has_initial_states: give one of each per prefill",
        ),
        (
            {"prefill_slots": [0], "prefill_lengths": [-2], "has_initial_states": [False]},
            "prefill 0 has length -2: a prefill takes in at least one token",
        ),
        (
            {"prefill_slots": [0, 1], "prefill_lengths": [3, 0], "has_initial_states": [False, False]},
            "prefill 1 has length 0: a prefill takes in at least one token",
        ),
        (
            {"prefill_slots": [NULL_SLOT], "prefill_lengths": [3], "has_initial_states": [True]},
            "prefill 0 continues a state but has no slot",
        ),
        ({"decode_slots": [0, 1], "num_padded_decodes": 1}, "num_padded_decodes=1 is below the 2 decodes"),
        ({"decode_slots": [-2]}, "state slot -2 does not exist"),
        ({"decode_slots": [4, 4]}, "state slot 4 is given to two rows"),
        (
            {"decode_slots": [4], "prefill_slots": [4], "prefill_lengths": [1], "has_initial_states": [True]},
            "state slot 4 is given to two rows",
        ),
    ],
)
def test_wrong_batches_are_refused(batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaMetadataBuilder("cpu").build(**batch)


def test_null_slots_may_repeat() -> None:
    metadata = MambaMetadataBuilder("cpu").build(decode_slots=[NULL_SLOT, 2, NULL_SLOT])
    assert metadata.state_indices.tolist() == [NULL_SLOT, 2, NULL_SLOT]


@pytest.mark.parametrize(
    ("rows", "gate_rows", "name"), [(3, 2, "hidden_states_BC has 3"), (2, 1, "gate has 1")]
)
def test_split_refuses_another_batchs_metadata(rows: int, gate_rows: int, name: str) -> None:
    metadata = MambaMetadataBuilder("cpu").build(decode_slots=[0, 1])
    with pytest.raises(ValueError, match=f"{name} rows but the metadata describes 2 tokens"):
        split_batch_to_prefill_and_decode(torch.zeros(rows, 4), torch.zeros(gate_rows, 4), metadata)
