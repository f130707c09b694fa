"""Training over data and tensor-parallel ranks: the losses of one rank, and checkpoints for any number of them."""

import json
from pathlib import Path

import pytest
import torch
from rank_pool import JobError
from training_samples import CONFIG, curve, documents, ranks_of, trainer

from tp_mamba.parallel.group import TensorParallel
from tp_mamba.training.data_parallel import masters_of
from tp_mamba.training.ranks import make_ranks
from tp_mamba.training.saver import read_tensors, step_folder, steps_in
from tp_mamba.training.setup import build_model
from tp_mamba.training.state import room_for


def train(tp, run, n, first=0, **changes):
    """Losses and norms of gradients, and whether what is replicated is alike on all ranks."""
    of = trainer(tp, Path(run), n, valid=documents((30, 50), seed=1), **changes)
    if first:
        of.load(first)
    losses = curve(of)
    digests = [
        (m.name, m.local.detach().double().sum().item())
        for m in of.masters
        if m.shard.dim is None and not m.over_data
    ]
    norms = [
        record["grad_norm"]
        for record in map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
        if "grad_norm" in record
    ]
    return losses, norms, of.best.loss, digests


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    """What one rank does, with a checkpoint of each step."""
    run = tmp_path_factory.mktemp("alone") / "run"
    (result,) = ranks(1).run(train, str(run), 1, save_every=1, keep=9)
    return run, result


@pytest.mark.parametrize(
    ("size", "n", "changes"),
    [
        (2, 2, {}),
        (2, 2, {"sequence_parallel": True}),
        (2, 1, {"micro_batches": 3}),
        (4, 2, {}),
        (4, 2, {"sequence_parallel": True}),
    ],
)
def test_losses_are_those_of_one_rank(ranks, alone, tmp_path, size, n, changes):
    _, (losses, norms, valid, _) = alone
    results = ranks(size).run(train, str(tmp_path), n, **changes)
    for rank in range(size):
        got_losses, got_norms, got_valid, replicated = results[rank]
        assert got_losses == results[0][0]  # every rank knows the same
        assert got_valid == results[0][2]
        assert replicated == results[0][3]
        torch.testing.assert_close(got_losses, losses, rtol=0, atol=1e-4)
        torch.testing.assert_close(got_norms, norms, rtol=1e-4, atol=0)
        assert abs(got_valid - valid) < 1e-4


@pytest.fixture(scope="module")
def two_by_two(ranks, tmp_path_factory):
    """A run over 2 x 2 ranks, with checkpoints of steps 3 and 6."""
    run = tmp_path_factory.mktemp("two_by_two") / "run"
    losses = ranks(4).run(train, str(run), 2, save_every=3)[0][0]
    assert steps_in(run) == [3, 6]
    return run, losses


def held(tp, folder, n):
    """Every tensor of a checkpoint as this rank holds it: name -> (where it is cut, values, shape of the whole)."""
    of = trainer(tp, Path(folder).parent, n)
    of.load(int(Path(folder).name.removeprefix("step-")))
    found = {}
    for master in of.masters:
        state = of.optimizer.state[master.local]
        moments = [(f"optimizer.{name}", state[name]) for name in ("exp_avg", "exp_avg_sq")]
        for what, tensor in (("model", master.local), *moments):
            view = master.layout.view(tensor.detach()).contiguous()
            found[f"{what}.{master.name}"] = (cuts(master, of.ranks), view, master.layout.shape)
        assert state["step"].item() == of.step
    return found


def cuts(master, ranks):
    """(dimension, index, parts) for each axis of the mesh that divides a tensor."""
    axes = ((ranks.dp.rank, ranks.dp.size), (ranks.tp.rank, ranks.tp.size))
    return [
        (placement.dim, index, parts)
        for placement, (index, parts) in zip(master.layout.placements, axes, strict=True)
        if placement.is_shard()
    ]


@pytest.mark.parametrize(("size", "n"), [(1, 1), (3, 3), (3, 1), (4, 4), (4, 2)])
def test_every_byte_loads_at_other_rank_counts(ranks, two_by_two, size, n):
    run, _ = two_by_two
    folder = step_folder(run, 3)
    whole = ranks_of(TensorParallel(device="cpu"), 1)
    model = build_model(whole, config=CONFIG, checkpoint=None, seed=9, compute_dtype=torch.float32)
    reference, _ = room_for(masters_of(model, whole), None, whole)
    keys = {
        f"{prefix}{key.removeprefix('model.')}": key
        for prefix in ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
        for key in reference
    }
    full = {key: torch.empty_like(reference[like]) for key, like in keys.items()}
    read_tensors(folder, full, whole)
    for result in ranks(size).run(held, str(folder), n):
        assert result.keys() == full.keys()
        for key, (divisions, view, shape) in result.items():
            part = full[key]
            assert part.shape == shape
            for dim, index, parts in divisions:
                chunks = part.chunk(parts, dim)
                part = chunks[index] if index < len(chunks) else part.narrow(dim, 0, 0)
            assert torch.equal(part, view), key
    assert all(full[key].abs().max() > 0 for key in full if key.startswith("optimizer.exp_avg."))


@pytest.mark.parametrize(("size", "n"), [(1, 1), (2, 1), (4, 2)])
def test_a_run_goes_on_at_other_rank_counts(ranks, two_by_two, tmp_path, size, n):
    run, losses = two_by_two
    (tmp_path / "run").mkdir()
    for path in step_folder(run, 3).iterdir():
        target = step_folder(tmp_path / "run", 3) / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    resumed = ranks(size).run(train, str(tmp_path / "run"), n, first=3)[0][0]
    if size == 4:
        assert resumed == losses[3:]  # the same topology, the same bits
    torch.testing.assert_close(resumed, losses[3:], rtol=0, atol=1e-4)


def wrong_mesh(tp):
    make_ranks(tp, 2)


def test_ranks_that_make_no_mesh_are_refused(ranks):
    with pytest.raises(JobError, match="3 ranks cannot be 2 tensor-parallel ranks times a number of data"):
        ranks(3).run(wrong_mesh)


def poisoned(tp, run):
    of = trainer(tp, Path(run), 2)
    if tp.rank == 1:
        of.model.mixers()[1].dt_proj.bias.data[0] = float("nan")
    of.fit()


def test_every_rank_names_the_parameter_of_one(ranks, tmp_path):
    with pytest.raises(JobError) as error:
        ranks(2).run(poisoned, str(tmp_path))
    sentences = {failure.message for failure in error.value.failures.values()}
    assert len(sentences) == 1
    assert (
        "step 1: the loss is nan, and the parameter backbone.layers.1.mixer.dt_proj.bias" in sentences.pop()
    )
