"""Training on one rank: against transformers, in parts, interrupted, broken off, and ended early."""

import json
import math

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from training_samples import CONFIG, curve, documents, ranks_of, settings, trainer
from transformers import MambaForCausalLM as TransformersMamba

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.parallel.group import TensorParallel
from tp_mamba.training.export import export_run, find_step
from tp_mamba.training.optimizer import learning_rate
from tp_mamba.training.packing import DataOrder, pack
from tp_mamba.training.saver import step_folder, steps_in
from tp_mamba.training.setup import build_model
from tp_mamba.training.trainer import DivergedError, Trainer

TP = TensorParallel(device="cpu")


def test_losses_are_those_of_transformers_training(tmp_path):
    # Documents of nine tokens are rows of eight, so a batch is a matrix for transformers.
    given = settings(steps=15, weight_decay=0.2, clip=0.7)
    tokens = documents((9,) * 30)
    model = build_model(ranks_of(TP, 1), config=CONFIG, checkpoint=None, seed=3, compute_dtype=torch.float32)
    model.save_pretrained(tmp_path / "begin")
    ours = curve(Trainer(model, given, ranks_of(TP, 1), tokens, None, tmp_path / "run"))

    theirs = TransformersMamba.from_pretrained(tmp_path / "begin", dtype=torch.float32).train()
    plain = [p for name, p in theirs.named_parameters() if p.dim() < 2 or name.endswith("A_log")]
    matrices = [p for p in theirs.parameters() if all(p is not q for q in plain)]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(given.beta1, given.beta2), eps=given.eps)
    scheduler = LambdaLR(
        optimizer,
        lambda done: learning_rate(
            done + 1, peak=given.lr, least=given.least_lr, warmup=given.warmup_steps, steps=given.steps
        ),
    )
    order, losses = DataOrder(tokens, 8, given.seed), []
    for _ in range(given.steps):
        batch = pack(tokens, order.take(given.batch_size))
        ids = torch.from_numpy(
            np.concatenate([batch.ids.reshape(-1, 8), batch.targets.reshape(-1, 8)[:, -1:]], 1)
        )
        loss = theirs(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), given.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < 1e-4


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_change_no_loss(tmp_path, parts):
    whole = curve(trainer(TP, tmp_path / "a"))
    divided = curve(trainer(TP, tmp_path / "b", micro_batches=parts))
    assert max(abs(a - b) for a, b in zip(whole, divided, strict=True)) < 1e-5


def test_a_run_goes_on_bit_for_bit(tmp_path):
    valid = documents((30, 50), seed=1)
    often = {"valid": valid, "eval_every": 2, "save_every": 1, "keep": 9}
    run = tmp_path / "run"
    losses = curve(trainer(TP, run, **often))
    metrics = (run / "metrics.jsonl").read_text()
    assert steps_in(run) == [1, 2, 3, 4, 5, 6]
    for step in (1, 3, 5):
        again = trainer(TP, run, **often)
        again.load(step)
        assert curve(again) == losses[step:]
        without_speed = [
            [
                {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
                for line in text.splitlines()
            ]
            for text in (metrics, (run / "metrics.jsonl").read_text())
        ]
        assert without_speed[0] == without_speed[1]


def test_the_last_checkpoints_and_the_best_stay(tmp_path, monkeypatch):
    run = trainer(TP, tmp_path, valid=documents((30,)), eval_every=1, save_every=1, keep=2)
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    monkeypatch.setattr(run, "evaluate", lambda: next(losses))
    report = run.fit()
    assert (report["best_step"], report["best_valid_loss"]) == (2, 2.0)
    assert steps_in(tmp_path) == [2, 5, 6]
    assert [find_step(tmp_path, wanted) for wanted in ("best", "last", 5)] == [2, 6, 5]
    with pytest.raises(CheckpointError, match="no checkpoint of step 4: it has 2, 5, 6"):
        find_step(tmp_path, 4)


def test_validation_that_gets_no_better_ends_training(tmp_path, monkeypatch):
    run = trainer(TP, tmp_path, valid=documents((30,)), eval_every=1, patience=2)
    losses = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(run, "evaluate", lambda: next(losses))
    report = run.fit()
    assert (report["steps"], report["stopped_early"]) == (4, True)
    assert steps_in(tmp_path) == [2, 4]


def test_validation_is_the_mean_over_every_token(tmp_path):
    valid = documents((30, 1, 9, 50), seed=1)
    run = trainer(TP, tmp_path, valid=valid)
    total = count = 0
    for a, b in zip(valid.bounds[:-1], valid.bounds[1:], strict=True):
        for start in range(a, b - 1, 8):
            ids = torch.from_numpy(valid.ids[start : min(start + 9, b)].astype(np.int64))[None]
            total += run.model.loss(ids, reduction="sum").item()
            count += ids.numel() - 1
    assert math.isclose(run.evaluate(), total / count, rel_tol=1e-6)


@pytest.mark.parametrize("broken", ["D", "loss"])
def test_a_loss_that_is_no_number_stops_training(tmp_path, broken):
    run = trainer(TP, tmp_path, save_every=1)
    before = {}

    def breaks(step, *_):
        if step == 3:
            if broken == "D":
                run.model.mixers()[1].D.data[4] = float("nan")
            else:
                loss = run.model.loss
                run.model.loss = lambda *a, **k: loss(*a, **k) * float("inf")
            before.update({m.name: m.local.detach().clone() for m in run.masters})

    named = {
        "D": "the loss is nan, and the parameter backbone.layers.1.mixer.D holds",
        "loss": "the loss is inf, and the gradient of backbone.norm_f.weight is the first",
    }[broken]
    with pytest.raises(DivergedError, match=f"step 4: {named}"):
        run.fit(breaks)
    assert steps_in(tmp_path) == [2, 3]
    for m in run.masters:
        assert torch.equal(m.local.isnan(), before[m.name].isnan())
    again = trainer(TP, tmp_path, save_every=1)
    again.load(3)
    assert all(math.isfinite(loss) for loss in curve(again))


def test_only_a_gradient_that_is_no_number_is_named(tmp_path):
    run = trainer(TP, tmp_path)
    weight = run.model.mixers()[0].x_proj.weight
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(
        DivergedError, match=r"step 1: a gradient is not finite, .*layers\.0\.mixer\.x_proj\.weight"
    ):
        run.fit()
    assert steps_in(tmp_path) == []


def test_another_model_or_other_settings_are_refused(tmp_path):
    trainer(TP, tmp_path, steps=2).fit()
    with pytest.raises(ValueError, match=r"step-00000002 was trained with lr 0\.005, and now it is 0\.1"):
        trainer(TP, tmp_path, steps=4, lr=0.1).load(2)
    longer = trainer(TP, tmp_path, steps=4)
    longer.load(2)
    assert len(curve(longer)) == 2
    info = json.loads((step_folder(tmp_path, 2) / "run.json").read_text())
    info["config"]["state_size"] = 8
    (step_folder(tmp_path, 2) / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="is of a model with state_size 8, and this one has 4"):
        trainer(TP, tmp_path, steps=4).load(2)


def test_time_that_is_up_ends_training(tmp_path):
    run = trainer(TP, tmp_path, max_seconds=1e-9)
    assert (run.fit()["steps"], steps_in(tmp_path)) == (1, [1])


def test_a_damaged_checkpoint_is_refused(tmp_path):
    trainer(TP, tmp_path, steps=2).fit()
    (file,) = step_folder(tmp_path, 2).glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-00000002 cannot be read as a checkpoint of this run"):
        trainer(TP, tmp_path, steps=2).load(2)


def test_transformers_loads_what_is_exported(tmp_path):
    run = trainer(TP, tmp_path / "run", steps=3)
    run.fit()
    report = export_run(tmp_path / "run", tmp_path / "out", dtype=torch.float32)
    assert report == {"step": 3, "valid_loss": None}
    theirs, loading = TransformersMamba.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    named = dict(theirs.named_parameters())
    for master in run.masters:
        assert torch.equal(named[master.name], master.local.view(named[master.name].shape))
