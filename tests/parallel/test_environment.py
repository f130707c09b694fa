"""Which backend and which GPU each rank takes, decided by all ranks from what all of them see."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tp_mamba.parallel import environment
from tp_mamba.parallel.environment import Place, Seen, decide, see
from tp_mamba.parallel.group import TensorParallel


def host(
    name: str, ranks: int, gpus: int, *, numbered: bool = True, backend: str | None = None
) -> list[Seen]:
    """``ranks`` ranks on one host that all see its ``gpus`` GPUs."""
    names = tuple(map(str, range(gpus)))
    return [Seen(name, names, rank if numbered else None, backend) for rank in range(ranks)]


def pinned(name: str, *gpus: str) -> list[Seen]:
    """One rank per GPU, each of which sees its own alone, as SLURM can arrange it."""
    return [Seen(name, (gpu,), rank, None) for rank, gpu in enumerate(gpus)]


NCCL = [Place("nccl", 0), Place("nccl", 1)]


@pytest.mark.parametrize(
    ("ranks", "places"),
    [
        (host("a", 2, 0), [Place("gloo", None)] * 2),
        (host("a", 2, 2), NCCL),
        (host("a", 2, 8), NCCL),
        (host("a", 2, 2, numbered=False), NCCL),
        (host("a", 2, 2) + host("b", 2, 4), NCCL * 2),
        (pinned("a", "4", "7"), [Place("nccl", 0)] * 2),
        (host("a", 2, 1, backend="gloo"), [Place("gloo", None)] * 2),
        (host("a", 2, 2, backend="nccl"), NCCL),
        ([Seen("b", ("0",), 0, None), Seen("a", ("0",), 0, None)], [Place("nccl", 0)] * 2),
        # LOCAL_RANK of a launcher that numbers over hosts is no index of a GPU: the order on the host is.
        ([Seen("a", ("0", "1"), 2, None), Seen("a", ("0", "1"), 3, None)], NCCL),
    ],
)
def test_places(ranks: list[Seen], places: list[Place]) -> None:
    assert decide(ranks) == places


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (host("a", 2, 2) + host("b", 2, 0), "2 ranks on b but 0 GPUs"),
        (host("a", 4, 2), "4 ranks on a but 2 GPUs: NCCL needs a GPU for each rank"),
        (host("a", 2, 1), "2 ranks on a but 1 GPU:"),
        (host("a", 1, 1) + host("b", 3, 2, numbered=False), "3 ranks on b but 2 GPUs"),
        (pinned("a", "4", "4"), "2 ranks on a but 1 GPU:"),
        (host("a", 1, 0, backend="nccl"), "1 rank on a but 0 GPUs"),
        (
            host("a", 1, 1) + host("b", 1, 1, backend="gloo"),
            "rank 0 asks for backend=None and rank 1 for 'gloo'",
        ),
    ],
)
def test_never_the_cpu_in_silence(ranks: list[Seen], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(ranks)


def test_what_a_rank_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert see("gloo", {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3, 5"}).gpus == ("3", "5")
    assert see(None, {}).gpus == ("0", "1")
    assert [see(None, {"LOCAL_RANK": local}).local_rank for local in ("1", "", "one")] == [1, None, None]
    assert see(None, {}).local_rank is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert see(None, {"CUDA_VISIBLE_DEVICES": ""}).gpus == ()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _join(rank: int, size: int, port: int, gpus: list[int], results: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.cuda.device_count = lambda: gpus[rank]
    environment.socket.gethostname = lambda: f"host{rank}"  # type: ignore[attr-defined]
    try:
        tp = TensorParallel.from_env(timeout=timedelta(seconds=120))
        results.put((rank, (tp.backend, float(tp.all_reduce_(torch.ones(1))))))
        dist.barrier()
    except ValueError as error:
        results.put((rank, str(error)))


@pytest.mark.parametrize("gpus", [[0, 0], [0, 1]])
def test_hosts_with_unequal_gpus_do_not_hang(gpus: list[int]) -> None:
    context = forks.context()
    results = context.Queue()
    port = free_port()
    ranks = [context.Process(target=_join, args=(rank, 2, port, gpus, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(120)
    if gpus == [0, 0]:
        assert found == {0: ("gloo", 2.0), 1: ("gloo", 2.0)}
    else:
        assert found[0] == found[1]
        assert "1 rank on host0 but 0 GPUs: NCCL needs a GPU for each rank" in found[0]


def _backend_left_out(tp: TensorParallel) -> tuple[str, str]:
    """A group of the default backends, as ``init_process_group()`` makes it: torch calls its backend "undefined"."""
    group = dist.new_group(backend="cpu:gloo,cuda:gloo")
    made = TensorParallel(group)
    return made.backend, made.device.type


def test_a_group_whose_backend_has_no_name(ranks) -> None:
    assert ranks(2).run(_backend_left_out) == [("gloo", "cpu")] * 2


def _on_a_gpu(results: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    os.environ["MASTER_PORT"] = str(free_port())
    found = []
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("tp",))
    found += [
        TensorParallel.from_mesh(mesh["tp"]),
        TensorParallel(dist.group.WORLD),
        TensorParallel.from_env(),
    ]
    dist.destroy_process_group()
    dist.init_process_group(init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    found += [TensorParallel(dist.group.WORLD), TensorParallel.from_env()]
    results.put([(tp.backend, str(tp.device)) for tp in found])
    dist.destroy_process_group()


@pytest.mark.gpu
def test_a_group_made_without_a_backend_computes_on_the_gpu() -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_on_a_gpu, args=(results,))
    process.start()
    assert results.get(timeout=300) == [("nccl", "cuda:0")] * 5
    process.join(120)
