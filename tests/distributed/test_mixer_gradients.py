"""Gradients through the mixer: one rank against autograd through plain torch, and 2, 3 and 4 ranks against one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import (
    KINDS,
    CountingCommunicator,
    Tensors,
    assert_close,
    broken,
    gradients,
    make_mixer,
    merged,
    normal,
    reference_mixer,
)
from torch.multiprocessing.reductions import StorageWeakRef

from tp_mamba import mixer as mixer_module
from tp_mamba.batch import MambaMetadataBuilder, packed_sequences
from tp_mamba.layers import linear
from tp_mamba.layers.norm import split_and_norm
from tp_mamba.mixer import MambaMixer, MambaState
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.parallel.sharding import Shard, sharded_tensors

ONE = TensorParallel(device="cpu")
LENGTHS = [4, 1, 6]
T = sum(LENGTHS)


def _inputs(mixer: MambaMixer) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(T, mixer.hidden_size, seed=1).requires_grad_(), normal(T, mixer.hidden_size, seed=2)


def _run(tp: TensorParallel, kind: str, breakage: str = "", recomputes: bool = False) -> Tensors:
    """Output, gradient of the input and of each parameter of this rank, for three packed sequences."""
    mixer = make_mixer(kind, tp)
    mixer.recomputes = recomputes
    h, dy = _inputs(mixer)
    identity = {
        "d(dt), dB, dC": (mixer_module, "copy_all_to_tp", lambda tensors, tp: tensors),
        "dx of in_proj": (linear, "whole", lambda x, tp: x),
    }
    undo = broken(*identity[breakage]) if breakage else lambda: None
    try:
        y = mixer(h, packed_sequences(LENGTHS, "cpu"))
        y.backward(dy)
    finally:
        undo()
    return {"h": h.grad, "y": y.detach(), **gradients(mixer)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_against_autograd_through_plain_torch(kind: str) -> None:
    mixer = make_mixer(kind, ONE)
    h, dy = _inputs(mixer)
    p = {t.name: t.param.detach().clone().requires_grad_() for t in sharded_tensors(mixer)}
    y = reference_mixer(mixer, p, h, LENGTHS)
    y.backward(dy)
    expected = {"y": y.detach(), "h": h.grad, **{name: tensor.grad for name, tensor in p.items()}}
    assert_close(_run(ONE, kind), expected)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_that_of_one_rank(ranks, kind: str, n: int) -> None:
    one, parts = _run(ONE, kind), ranks(n).run(_run, kind)
    assert_close(merged(parts, make_mixer(kind, ONE)), {k: v for k, v in one.items() if k not in "hy"})
    for part in parts:
        assert_close(part, {"h": one["h"], "y": one["y"]})
        assert torch.equal(part["h"], parts[0]["h"]), "the ranks differ in a bit"


@pytest.mark.parametrize(
    ("breakage", "wrong"),
    [("d(dt), dB, dC", ("h", "in_proj.weight", "dt_layernorm.weight")), ("dx of in_proj", ("h",))],
)
def test_a_gradient_that_is_not_reduced_would_be_seen(ranks, breakage: str, wrong: tuple[str, ...]) -> None:
    one, part = _run(ONE, "jamba"), ranks(2).run(_run, "jamba", breakage)[0]
    for name in wrong:
        expected = one[name]
        if part[name].shape != expected.shape:
            shard = make_mixer("jamba", ONE).in_proj.shards["weight"]
            expected = shard.shard(expected, 0, 2)
        assert (part[name] - expected).norm() > 0.1 * expected.norm()


def _count(tp: TensorParallel) -> tuple[list[Any], list[Any]]:
    counting = CountingCommunicator()
    mixer = make_mixer("jamba", TensorParallel(tp.group, device="cpu", communicator=counting))
    h, dy = _inputs(mixer)
    y = mixer(h)
    forward, counting.all_reduced = counting.all_reduced, []
    y.backward(dy)
    assert counting.gathered == counting.scattered == []
    return forward, counting.all_reduced


def test_two_collectives_forward_and_two_backward(ranks) -> None:
    mixer = make_mixer("jamba", ONE)
    H, widths = mixer.hidden_size, mixer.time_step_rank + 2 * mixer.ssm_state_size
    assert ranks(2).run(_count) == [([(T, widths), (T, H)], [(T, widths), (T, H)])] * 2


def test_no_bit_depends_on_what_is_computed_again() -> None:
    kept, again = _run(ONE, "jamba"), _run(ONE, "jamba", recomputes=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("recomputes", [False, True])
def test_what_is_computed_again_is_not_kept(monkeypatch: pytest.MonkeyPatch, recomputes: bool) -> None:
    made: dict[str, list[StorageWeakRef]] = {"u": [], "delta": []}

    def noting(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            result = function(*args)
            tensor = result[0] if isinstance(result, tuple) else result
            made[name].append(StorageWeakRef(tensor.untyped_storage()))
            return result

        return call

    mixer = make_mixer("jamba", ONE)
    mixer.recomputes = recomputes
    monkeypatch.setattr(mixer.conv1d, "sequences", noting("u", mixer.conv1d.sequences))
    monkeypatch.setattr(mixer, "time_steps", noting("delta", mixer.time_steps))
    h, dy = _inputs(mixer)
    y = mixer(h)
    assert [ref.expired() for refs in made.values() for ref in refs] == [recomputes] * 2
    y.backward(dy)
    assert [len(refs) for refs in made.values()] == [1 + recomputes] * 2, "once more each, whoever reads it"
    assert all(ref.expired() for refs in made.values() for ref in refs)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_have_the_gradients_of_each_alone(kind: str) -> None:
    packed, mixer = _run(ONE, kind), make_mixer(kind, ONE)
    h, dy = _inputs(mixer)
    alone = [part.detach().requires_grad_() for part in h.split(LENGTHS)]
    ys = [mixer(part) for part in alone]
    for y, d in zip(ys, dy.split(LENGTHS), strict=True):
        y.backward(d)
    assert_close(gradients(mixer), {k: v for k, v in packed.items() if k not in "hy"})
    assert_close({"h": torch.cat([part.grad for part in alone])}, {"h": packed["h"]})


def _in_segments(tp: TensorParallel, kind: str, cuts: list[int]) -> Tensors:
    """Two sequences of 14 tokens, cut alike, from initial states that want a gradient; the final ones have one."""
    mixer = make_mixer(kind, tp)
    h = normal(2, 14, mixer.hidden_size, seed=3).requires_grad_()
    initial, dfinal = [], []
    for seed, (D, width) in enumerate(mixer.get_state_shape(), 4):
        shard = Shard(shape=(2, mixer.intermediate_size, width), dim=1)
        full = normal(2, mixer.intermediate_size, width, seed=seed)
        initial.append(shard.shard(full, tp.rank, tp.size).requires_grad_())
        dfinal.append(shard.shard(full.flip(0), tp.rank, tp.size))
        assert initial[-1].shape == (2, D, width)
    state, ys = MambaState(*initial), []
    for part in h.split(cuts, dim=1):
        y, state = mixer.segment(part.contiguous(), state)
        ys.append(y)
    y = torch.cat(ys, dim=1)
    torch.autograd.backward([y, *state], [normal(*y.shape, seed=6), *dfinal])
    states = {"conv_state": initial[0].grad, "ssm_state": initial[1].grad}
    return {"h": h.grad, "y": y.detach(), **states, **gradients(mixer)}


@pytest.mark.parametrize("kind", KINDS)
def test_segments_with_states_carried_have_the_gradients_of_the_whole(kind: str) -> None:
    whole = _in_segments(ONE, kind, [14])
    assert_close(_in_segments(ONE, kind, [5, 9]), whole)
    assert_close(_in_segments(ONE, kind, [1, 2, 3, 1, 4, 1, 2]), whole)


@pytest.mark.parametrize("n", [2, 4])
def test_states_have_the_gradients_of_one_rank(ranks, n: int) -> None:
    one, parts = _in_segments(ONE, "jamba", [5, 9]), ranks(n).run(_in_segments, "jamba", [5, 9])
    mixer = make_mixer("jamba", ONE)
    found = merged(parts, mixer)
    for name, (D, width) in zip(MambaState._fields, mixer.get_state_shape(), strict=True):
        found[name] = Shard(shape=(2, D, width), dim=1).merge([part[name] for part in parts])
    assert_close({**found, "h": parts[-1]["h"], "y": parts[-1]["y"]}, one)


def test_a_segment_from_nothing_is_the_beginning() -> None:
    mixer = make_mixer("mamba", ONE)
    h, _ = _inputs(mixer)
    y, state = mixer.segment(h)
    torch.testing.assert_close(y, mixer(h), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"conv_state has shape .* but one state per sequence is"):
        mixer.segment(h.view(1, T, -1).expand(2, -1, -1), state)


def test_what_is_updated_in_place_is_refused_under_autograd() -> None:
    mixer = make_mixer("mamba", ONE)
    builder, h = MambaMetadataBuilder("cpu"), torch.zeros(2, 6, dtype=torch.float64)
    shapes = mixer.get_state_shape()
    state = MambaState(*(torch.zeros(2, *shape, dtype=torch.float64) for shape in shapes))
    prefill = builder.build(prefill_slots=[0], prefill_lengths=[2], has_initial_states=[False])
    with pytest.raises(RuntimeError, match="2 decode rows and gradients are tracked"):
        mixer(h, builder.build(decode_slots=[0, 1]), state)
    with pytest.raises(RuntimeError, match="updates states in place and gradients are tracked"):
        mixer(h, prefill, state)
    with torch.no_grad():
        assert torch.equal(mixer(h, prefill, state), mixer(h))


def _bfloat16_time_steps(tp: TensorParallel) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    mixer = MambaMixer(6, 4, 3, 64, 3, True, False, False, tp=tp, dtype=torch.bfloat16)
    u = Shard(shape=(5, 64), dim=1).shard(torch.randn(5, 64).bfloat16(), tp.rank, tp.size)
    partial = mixer.x_proj.partial(u, slices=True)
    return split_and_norm(partial, None, None, None, time_step_rank=3, state_size=4, dt_dtype=torch.bfloat16)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_b_and_c_keep_the_float32_of_the_sum(ranks, n: int) -> None:
    """bf16 weights and inputs: dt is rounded once, for its GEMM; B and C are not rounded at all."""
    torch.manual_seed(1)
    whole = MambaMixer(6, 4, 3, 64, 3, True, False, False, dtype=torch.bfloat16)
    u = torch.randn(5, 64).bfloat16()
    exact = u.double() @ whole.x_proj.weight.double().t()
    for dt, B, C in ranks(n).run(_bfloat16_time_steps):
        assert (dt.dtype, B.dtype, C.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        torch.testing.assert_close(torch.cat([B, C], -1).double(), exact[:, 3:], rtol=1e-5, atol=1e-6)
        assert torch.equal(dt, exact[:, :3].float().bfloat16())


def test_the_forward_with_gradients_is_the_forward_without() -> None:
    mixer = make_mixer("jamba", ONE, dtype=torch.float32)
    frozen = make_mixer("jamba", ONE, dtype=torch.float32, trainable=False)
    h = normal(T, mixer.hidden_size, seed=1, dtype=torch.float32)
    tracked = mixer(h)
    assert tracked.requires_grad
    with torch.no_grad():
        assert torch.equal(tracked, mixer(h))
    assert torch.equal(tracked, frozen(h))
    h.requires_grad_()
    frozen(h).sum().backward()
    assert h.grad is not None
    assert all(p.grad is None for p in frozen.parameters())
