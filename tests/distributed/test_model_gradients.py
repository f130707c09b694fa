"""The loss of a whole model and its gradients: against torch's cross-entropy on gathered logits, at 1 to 4 ranks, with
tokens scattered between layers or not, and whatever the backward computes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import CountingCommunicator, Tensors, assert_close, broken, draw, gradients, merged

from tp_mamba import MambaConfig, MambaForCausalLM
from tp_mamba.batch import packed_sequences
from tp_mamba.layers import vocab
from tp_mamba.parallel import communicate, sequence
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sequence import SequenceParallel

ONE = TensorParallel(device="cpu")
LENGTHS = [4, 1, 6]
SIZES: dict[str, Any] = {
    "hidden_size": 6,
    "intermediate_size": 9,
    "num_hidden_layers": 2,
    "state_size": 3,
    "conv_kernel": 3,
    "time_step_rank": 2,
}
# Rows of the vocabulary that n ranks do not divide; of 5 over 4 ranks the last one has none.
CONFIGS = {
    "tied": MambaConfig(model_type="mamba", vocab_size=19, use_bias=True, **SIZES),
    "untied": MambaConfig(model_type="mamba", vocab_size=5, tie_word_embeddings=False, **SIZES),
    "falcon": MambaConfig(
        model_type="falcon_mamba", vocab_size=7, mixer_norm="weightless", tie_word_embeddings=False, **SIZES
    ),
}


class CountingSequenceParallel(SequenceParallel, CountingCommunicator):
    """Both."""


def make_model(tp: TensorParallel, name: str, **options: Any) -> MambaForCausalLM:
    options = {"dtype": torch.float64, "trainable": True, "device": "cpu", **options}
    model = MambaForCausalLM(CONFIGS[name], tp, **options)
    draw(model)
    return model


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[T]`` of three packed documents, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(7)
    ids, labels = torch.randint(0, CONFIGS[name].vocab_size, (2, sum(LENGTHS)), generator=generator)
    labels[[2, 4]] = -100
    return ids, labels


def run(
    tp: TensorParallel, name: str, *, scattered: bool = False, level: int = 0, breakage: str = ""
) -> tuple[Tensors, list[int]]:
    """The loss and every gradient of this rank, and how often it all-reduced, gathered and reduce-scattered."""
    counting = CountingSequenceParallel() if scattered else CountingCommunicator()
    model = make_model(TensorParallel(tp.group, device="cpu", communicator=counting), name)
    model.checkpoint_level = level
    identity: dict[str, Any] = {
        "dh of the head": (vocab, "whole", lambda x, tp: x),
        "norm weights": (communicate, "copy_to_tp", lambda x, tp: x),
        "bias of out_proj": (sequence, "copy_to_tp", lambda x, tp: x),
    }
    undo = broken(*identity[breakage]) if breakage else lambda: None
    try:
        loss = model.loss(*batch(name), packed_sequences(LENGTHS, "cpu"))
        loss.backward()
    finally:
        undo()
    counts = [len(calls) for calls in (counting.all_reduced, counting.gathered, counting.scattered)]
    return {"loss": loss.detach(), **gradients(model)}, counts


@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank_against_cross_entropy_on_logits(name: str) -> None:
    model = make_model(ONE, name)
    ids, labels = batch(name)
    logits = torch.cat([model(part[None])[0] for part in ids.split(LENGTHS)])
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert_close(run(ONE, name)[0], {"loss": loss.detach(), **gradients(model)})


@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_is_that_of_one_rank(ranks, name: str, n: int, scattered: bool) -> None:
    one, _ = run(ONE, name)
    parts = [part for part, _ in ranks(n).run(run, name, scattered=scattered)]
    found = merged(parts, make_model(ONE, name))
    assert_close(found, {key: tensor for key, tensor in one.items() if key != "loss"})
    for part in parts:
        assert torch.equal(part["loss"], parts[0]["loss"]), "the ranks differ in a bit"
        assert_close(part, {"loss": one["loss"]})


def _logits(tp: TensorParallel, scattered: bool) -> Tensors:
    communicator = SequenceParallel() if scattered else None
    model = make_model(TensorParallel(tp.group, device="cpu", communicator=communicator), "tied")
    logits = model(batch("tied")[0][None])
    logits.square().sum().backward()
    return {"logits": logits.detach(), **gradients(model)}


@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
def test_gradients_of_the_logits(ranks, scattered: bool) -> None:
    one, parts = _logits(ONE, scattered), ranks(3).run(_logits, scattered)
    assert_close(merged(parts, make_model(ONE, "tied")), {k: v for k, v in one.items() if k != "logits"})
    assert_close({"logits": parts[1]["logits"]}, {"logits": one["logits"]})


@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize("level", [1, 2])
def test_no_bit_and_no_collective_depends_on_what_is_computed_again(
    ranks, level: int, scattered: bool
) -> None:
    kept = ranks(2).run(run, "tied", scattered=scattered)
    again = ranks(2).run(run, "tied", scattered=scattered, level=level)
    for (before, counts), (after, counts_after) in zip(kept, again, strict=True):
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        reduced, gathered, reduce_scattered = counts
        # A layer that is computed again gathers its scattered tokens again: kept, they would not be scattered.
        extra = 2 if scattered and level == 2 else 0
        assert counts_after == [reduced, gathered + extra, reduce_scattered]


def test_collectives_of_a_step(ranks) -> None:
    """A layer has two forward and two backward; scattered, those of [T, H] are a gather and a scatter each."""
    layers = SIZES["num_hidden_layers"]
    (_, whole), _ = ranks(2).run(run, "tied")
    # Beside the layers': the embedding's sum and the head's dh; the losses' gather.
    assert whole == [4 * layers + 2, 1, 0]
    (_, scattered), _ = ranks(2).run(run, "tied", scattered=True)
    # x_proj's both ways; the small ones: a norm per layer and the last one, and out_proj's bias.
    small = 2 * layers + 1
    gathers, scatters = layers + 1, layers + 1
    assert scattered == [2 * layers + small, 2 * gathers + 1, 2 * scatters]


@pytest.mark.parametrize(
    ("breakage", "scattered", "wrong"),
    [
        ("dh of the head", False, "backbone.norm_f.weight"),
        ("norm weights", True, "backbone.layers.1.norm.weight"),
        ("bias of out_proj", True, "backbone.layers.0.mixer.out_proj.bias"),
    ],
)
def test_a_gradient_that_is_not_reduced_would_be_seen(
    ranks, breakage: str, scattered: bool, wrong: str
) -> None:
    one, _ = run(ONE, "tied")
    part, _ = ranks(2).run(run, "tied", scattered=scattered, breakage=breakage)[0]
    assert (part[wrong] - one[wrong]).norm() > 0.1 * one[wrong].norm()


def test_padding_gets_no_gradient(ranks) -> None:
    """9 channels are 3 + 3 + 3 + 0 and 5 rows of the vocabulary 2 + 2 + 1 + 0: the last rank has nothing but zeros."""
    for part, _ in ranks(4).run(run, "untied")[-1:]:
        assert not part["lm_head.weight"].any()
        assert not part["backbone.embeddings.weight"].any()
        assert not part["backbone.layers.0.mixer.A_log"].any()


@pytest.mark.parametrize("name", ["tied", "falcon"])
def test_train_and_eval_are_the_same_function(name: str) -> None:
    model, (ids, labels) = make_model(ONE, name, dtype=torch.float32), batch(name)
    assert model.training
    training = model.loss(ids[None], labels[None])
    with torch.no_grad():
        logits = model.eval()(ids[None])
        assert torch.equal(model.loss(ids[None], labels[None]), training)
        assert torch.equal(model.train()(ids[None]), logits)
    frozen = make_model(ONE, name, dtype=torch.float32, trainable=False)
    assert not frozen.training
    assert torch.equal(frozen(ids[None]), logits)


def test_bfloat16_activations_leave_float32_gradients(ranks) -> None:
    for found, exact in zip(ranks(2).run(_mixed, torch.bfloat16), ranks(2).run(_mixed, None), strict=True):
        assert found.keys() == exact.keys()
        for name, tensor in exact.items():
            assert found[name].dtype == torch.float32, name
            # A handful of roundings to 8 bits in a chain of two layers.
            assert (found[name] - tensor).norm() < 0.1 * tensor.norm(), name
            assert not torch.equal(found[name], tensor)


def _mixed(tp: TensorParallel, compute_dtype: torch.dtype | None) -> Tensors:
    model = make_model(tp, "tied", dtype=torch.float32, compute_dtype=compute_dtype)
    loss = model.loss(*batch("tied"), packed_sequences(LENGTHS, "cpu"))
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def test_reductions_and_default_labels() -> None:
    model, (ids, labels) = make_model(ONE, "tied"), batch("tied")
    packed = packed_sequences(LENGTHS, "cpu")
    each = model.loss(ids, labels, packed, reduction="none")
    assert each.shape == ids.shape
    assert not each[labels == -100].any()
    torch.testing.assert_close(model.loss(ids, labels, packed, reduction="sum"), each.sum())
    torch.testing.assert_close(model.loss(ids, labels, packed), each.sum() / (len(ids) - 2))

    following = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in ids.split(LENGTHS)])
    assert torch.equal(model.loss(ids, metadata=packed), model.loss(ids, following, packed))
    weights = torch.rand(len(ids), dtype=torch.float64)
    (model.loss(ids, labels, packed, reduction="none") * weights).sum().backward()
    found = gradients(model)
    other = make_model(ONE, "tied")
    logits = torch.cat([other(part[None])[0] for part in ids.split(LENGTHS)])
    (F.cross_entropy(logits, labels, reduction="none") * weights).sum().backward()
    assert_close(found, gradients(other))


def test_loss_refuses() -> None:
    model, (ids, labels) = make_model(ONE, "untied"), batch("untied")
    packed = packed_sequences(LENGTHS, "cpu")
    with pytest.raises(ValueError, match=r"expected \[B, L\]"):
        model.loss(ids)
    with pytest.raises(ValueError, match=r"labels of shape \[10\] for input_ids of shape \[11\]"):
        model.loss(ids, labels[1:], packed)
    with pytest.raises(ValueError, match="ids between 0 and 5, the vocabulary has ids 0 to 4"):
        model.loss(ids.clamp(min=1).index_fill(0, torch.tensor([0, 1]), 5) - (ids == 1).int(), labels, packed)
    with pytest.raises(ValueError, match="reduction 'max'"):
        model.loss(ids, labels, packed, reduction="max")
    with pytest.raises(ValueError, match="input_ids has 10 rows but the metadata describes 11 tokens"):
        model.loss(ids[1:], labels[1:], packed)
    assert model.loss(ids, labels.index_fill(0, torch.tensor([0]), 5), packed).isnan()
    with pytest.raises(ValueError, match="checkpoint_level 3"):
        model.checkpoint_level = 3
    with pytest.raises(ValueError, match="is for training: set trainable=True"):
        MambaForCausalLM(CONFIGS["tied"], dtype=torch.float32, compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"compute_dtype=torch.float32 does not go with parameters in"):
        MambaForCausalLM(CONFIGS["tied"], dtype=torch.bfloat16, compute_dtype=torch.float32, trainable=True)
