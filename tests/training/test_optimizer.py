"""AdamW's groups, the learning rate, the norm of gradients, and settings that are refused."""

import math

import pytest
import torch
from training_samples import settings, trainer

from tp_mamba.parallel.group import TensorParallel
from tp_mamba.training.flops import flops_per_token, peak_flops
from tp_mamba.training.optimizer import clip_gradients, gradient_norms, learning_rate


def test_what_decays(tmp_path):
    run = trainer(TensorParallel(device="cpu"), tmp_path)
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    kept = {
        m.name.removeprefix("backbone.").split("mixer.")[-1] for m in run.masters if not decay[id(m.local)]
    }
    decayed = {m.name.split("mixer.")[-1] for m in run.masters if decay[id(m.local)]}
    assert kept == {
        "A_log",
        "D",
        "dt_proj.bias",
        "conv1d.bias",
        "layers.0.norm.weight",
        "layers.1.norm.weight",
        "norm_f.weight",
    }
    matrices = {f"{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    assert decayed == matrices | {"backbone.embeddings.weight"}
    assert len(decay) == len(list(run.model.parameters()))


def test_learning_rate():
    def lr(step):
        return learning_rate(step, peak=1.0, least=0.1, warmup=10, steps=110)

    assert [lr(step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert math.isclose(lr(60), 0.55)
    assert math.isclose(lr(110), 0.1)
    assert math.isclose(lr(200), 0.1)
    assert all(lr(step) > lr(step + 1) for step in range(10, 110))


@pytest.mark.parametrize("largest", [0.01, 1e6])
def test_clipping_is_torchs(tmp_path, largest):
    run = trainer(TensorParallel(device="cpu"), tmp_path)
    parameters = [m.local for m in run.masters]
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    mine = [p.grad.clone() for p in parameters]
    norms, also = gradient_norms(run.masters, run.ranks, torch.tensor([7.0]))
    norm = float(norms.square().sum().sqrt())
    clip_gradients(run.masters, norm, largest)
    clipped = [p.grad for p in parameters]
    for p, grad in zip(parameters, mine, strict=True):
        p.grad = grad
    expected = torch.nn.utils.clip_grad_norm_(parameters, largest)
    assert math.isclose(norm, float(expected), rel_tol=1e-6)
    assert float(also) == 7
    for got, p in zip(clipped, parameters, strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"min_lr": 1.0}, "min_lr is 1"),
        ({"warmup": 6}, "warmup is 6 of 6 steps"),
        ({"beta2": 1.0}, "beta2 is 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"patience": 2}, "eval_every is 0"),
        ({"batch_size": True}, "batch_size is True"),
    ],
)
def test_settings_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(**changes)


def test_a_batch_that_does_not_divide_is_refused():
    settings(micro_batches=3).check_ranks(2)
    with pytest.raises(ValueError, match="6 rows does not divide by 5 data ranks times 1 micro"):
        settings().check_ranks(5)


def test_flops_are_six_for_each_weight_of_a_matrix(tmp_path):
    run = trainer(TensorParallel(device="cpu"), tmp_path)
    matrices = [
        m for m in run.masters if len(m.shard.shape) == 2 and not m.shard.wide
    ]  # the head is the embedding
    assert flops_per_token(run.model.config) == 6 * sum(math.prod(m.shard.shape) for m in matrices)
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
