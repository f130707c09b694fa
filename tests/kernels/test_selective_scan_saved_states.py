"""The states that a scan saves on its way: against float64, and as what a backward needs, a place to start again."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_testing import (
    DEVICES,
    Launches,
    assert_within_twice,
    compile_for_hopper,
    double,
    specialization,
    stack_bytes,
    to,
    triton_device,
)
from scan_testing import CUTS, force_any, force_cut, loop_of, scan_module
from test_selective_scan import make

from tp_mamba.kernels.common.device import INTERPRETED
from tp_mamba.kernels.selective_scan import selective_scan_fn
from tp_mamba.kernels.selective_scan.launch import LaunchPlan, mixer_plan
from tp_mamba.kernels.selective_scan.reference import selective_scan_reference

LENGTHS = [11, 0, 1, 8]
MIXER, GENERAL = "mixer", "general"


@pytest.fixture(params=[*DEVICES, "cpu"])
def any_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Triton interpreted, Triton on a GPU, plain torch."""
    return torch.device("cpu") if request.param == "cpu" else triton_device(request.param, monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return triton_device(request.param, monkeypatch)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` full of NaN: what a call does not write shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def only(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel for a mixer's layout run, or the general one; the other fails."""
    if kernel == GENERAL:
        force_any(monkeypatch)
        monkeypatch.setattr(scan_module("mixer"), "selective_scan_tiles_kernel", None)
    else:
        monkeypatch.setattr(scan_module("any"), "_selective_scan_kernel", None)


def packed(
    channels: int, n: int, lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """A packed batch with B and C aligned as the mixer's are; every other sequence continues from its slot."""
    inputs = make(channels, n, lengths, dtype, seed=seed)
    inputs |= {name: inputs[name].t().contiguous().t() for name in ("B", "C")}
    states = torch.randn(len(lengths), n, channels, generator=torch.Generator().manual_seed(seed)).mT
    return inputs | {"ssm_states": states, "has_initial_state": torch.arange(len(lengths)) % 2 == 0}


def dense(channels: int, n: int, length: int, seed: int = 0) -> dict[str, Any]:
    """The same as a batch ``[3, D, L]``."""
    inputs = packed(channels, n, [length] * 3, seed=seed)
    del inputs["query_start_loc"]
    cut = {
        name: inputs[name].unflatten(1, (3, length)).movedim(1, 0) for name in ("u", "delta", "z", "B", "C")
    }
    return inputs | cut


def own(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` with states of its own for a call to write."""
    return inputs | {"ssm_states": inputs["ssm_states"].clone()}


def rows_of(lengths: list[int], k: int) -> list[list[int]]:
    """The rows of each packed sequence."""
    rows, start = [], 0
    for s, length in enumerate(lengths):
        rows.append([start // k + s + j for j in range(-(-length // k))])
        start += length
    return rows


def all_rows(lengths: list[int], k: int) -> list[int]:
    return list(chain.from_iterable(rows_of(lengths, k)))


def check(inputs: dict[str, Any], device: torch.device, k: int) -> torch.Tensor:
    """All three results within twice the reference's error; the saved states are returned."""
    exact = selective_scan_reference(**own(double(inputs)), save_states_every=k)
    reference = selective_scan_reference(**own(inputs), save_states_every=k)
    actual = selective_scan_fn(**own(to(inputs, device)), return_last_state=True, save_states_every=k)
    saved = actual[2].cpu()
    assert saved.shape == exact[2].shape
    written = ~saved.isnan().all(-1).all(-1)
    if "query_start_loc" in inputs:
        lengths = inputs["query_start_loc"].diff().tolist()
        mine = all_rows(lengths, k)
        assert len(mine) == len({*mine})
        assert written.nonzero()[:, 0].tolist() == mine
    else:
        assert written.all()
    # The decay is 2 to a product that is rounded once more than that of exp.
    assert_within_twice(actual[0], reference[0], exact[0], approximate=0.05)
    assert_within_twice(actual[1], reference[1], exact[1], approximate=0.05)
    assert_within_twice(saved[written], reference[2][written], exact[2][written], approximate=0.05)
    return saved


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("k", [1, 3, 8, (1 << 32) + 8])
@pytest.mark.parametrize("n", [5, 16])
def test_packed_matches_float64(any_device: torch.device, n: int, k: int) -> None:
    """Row by row the states, the first of a sequence what it started from; rows of no sequence stay unwritten."""
    inputs = packed(37, n, LENGTHS, seed=n)
    saved = check(inputs, any_device, k)
    for s, rows in enumerate(rows_of(LENGTHS, k)):
        if rows:
            initial = inputs["ssm_states"][s] * inputs["has_initial_state"][s]
            assert torch.equal(saved[rows[0]], initial)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("k", [2, 8, 9, 10])
@pytest.mark.parametrize("n", [5, 16])
def test_dense_matches_float64(any_device: torch.device, n: int, k: int) -> None:
    assert check(dense(20, n, 9, seed=n), any_device, k).shape == (3, -(-9 // k), 20, n)


@pytest.mark.parametrize(("kernel", "k"), [(MIXER, 2), (MIXER, 4), (MIXER, 24), (GENERAL, 1), (GENERAL, 3)])
def test_pieces_start_again_from_their_rows(
    device: torch.device, kernel: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call over all pieces of ``k`` tokens, each from its row: the bits of the whole; each ends as the next began.

    The call that saves nothing has the same bits.
    """
    only(kernel, monkeypatch)
    inputs = to(packed(10, 16, LENGTHS, torch.bfloat16, seed=k), device)
    out, last, saved = selective_scan_fn(**own(inputs), return_last_state=True, save_states_every=k)
    plain_out, plain_last = selective_scan_fn(**own(inputs), return_last_state=True)
    assert torch.equal(out, plain_out)
    assert torch.equal(last, plain_last)

    rows = rows_of(LENGTHS, k)
    starts, start = [], 0
    for length in LENGTHS:
        starts += range(start, start + length, k)
        start += length
    states = saved.clone()
    pieces = inputs | {
        "query_start_loc": torch.tensor([*starts, start], dtype=torch.int32, device=device),
        "cache_indices": torch.tensor(all_rows(LENGTHS, k), dtype=torch.int32, device=device),
        "has_initial_state": torch.ones(len(starts), dtype=torch.bool, device=device),
        "ssm_states": states,
    }
    assert torch.equal(selective_scan_fn(**pieces), out)
    for s, of_sequence in enumerate(rows):
        for row, following in pairwise(of_sequence):
            assert torch.equal(states[row], saved[following])
        if of_sequence:
            assert torch.equal(states[of_sequence[-1]], last[s])


@pytest.mark.parametrize("k", [6, 16])
def test_bits_do_not_depend_on_the_launch(
    device: torch.device, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The general kernel, then launches of the other, with a last block of channels that is not full."""
    inputs = to(packed(40, 16, [5, 17], torch.bfloat16, seed=k), device)
    mine = all_rows([5, 17], k)
    with monkeypatch.context() as patch:
        only(GENERAL, patch)
        first = selective_scan_fn(**own(inputs), save_states_every=k)
    only(MIXER, monkeypatch)
    for cut in CUTS[1:5]:
        force_cut(*cut, monkeypatch)
        out, saved = selective_scan_fn(**own(inputs), save_states_every=k)
        assert torch.equal(out, first[0])
        assert torch.equal(saved[mine], first[1][mine])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 30, 31, 1000])
def test_cpu_path_float64(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three tokens, pieces of twelve: rows fall on and between their ends. The rest keeps its bits."""
    monkeypatch.setattr("tp_mamba.kernels.selective_scan.cpu._BLOCK_ELEMENTS", 3 * 6 * 4)
    for inputs in (packed(6, 4, [30, 0, 2, 13], seed=k), dense(6, 4, 31, seed=k)):
        exact = selective_scan_reference(**own(double(inputs)), save_states_every=k)
        out, last, saved = selective_scan_fn(
            **own(double(inputs)), return_last_state=True, save_states_every=k
        )
        assert saved.dtype == torch.float64
        mine = all_rows([30, 0, 2, 13], k) if "query_start_loc" in inputs else slice(None)
        torch.testing.assert_close(saved[mine], exact[2][mine], rtol=1e-12, atol=1e-12)
        plain_out, plain_last = selective_scan_fn(**own(double(inputs)), return_last_state=True)
        assert torch.equal(out, plain_out)
        assert torch.equal(last, plain_last)


def test_what_is_returned(any_device: torch.device) -> None:
    """Nothing, either or both beside the output, in one order; the states with channels contiguous."""
    inputs = to(packed(12, 4, [5, 3]), any_device)
    out = torch.empty_like(inputs["u"])
    assert selective_scan_fn(**own(inputs), out=out) is out
    both = selective_scan_fn(**own(inputs), out=out, return_last_state=True, save_states_every=4)
    assert [tuple(x.shape) for x in both] == [(12, 8), (2, 12, 4), (4, 12, 4)]
    assert both[0] is out
    saving = selective_scan_fn(**own(inputs), out=out, save_states_every=4)
    assert len(saving) == 2
    mine = all_rows([5, 3], 4)
    assert torch.equal(saving[1][mine], both[2][mine])
    assert both[2].mT.is_contiguous()
    assert both[2].dtype == torch.float32
    none = {name: inputs[name][..., :0] for name in ("u", "delta", "z", "B", "C")}
    none |= {"query_start_loc": inputs["query_start_loc"] * 0}
    assert selective_scan_fn(**own(inputs | none), save_states_every=4)[1].shape == (2, 12, 4)


@pytest.mark.parametrize("k", [0, -3, 2.0, True, "8", torch.tensor(8)])
def test_refusals(k: Any) -> None:
    inputs = make(4, 2, [6])
    out = torch.full_like(inputs["u"], 7.0)
    with pytest.raises(ValueError, match=r"^selective_scan_fn: save_states_every is ") as refusal:
        selective_scan_fn(**inputs, out=out, save_states_every=k)
    assert f"is {k!r} but must be an int of 1 or more" in str(refusal.value)
    assert (out == 7.0).all()


def test_compiled_and_opcheck() -> None:
    inputs = packed(4, 4, [5, 3], seed=43)
    eager = selective_scan_fn(**own(inputs), return_last_state=True, save_states_every=2)
    compiled = torch.compile(selective_scan_fn, fullgraph=True, backend="aot_eager")
    mine = all_rows([5, 3], 2)
    for x, y in zip(compiled(**own(inputs), return_last_state=True, save_states_every=2), eager, strict=True):
        assert x.stride() == y.stride()
        keep = mine if len(x) == len(eager[2]) else slice(None)
        assert torch.equal(x[keep], y[keep])
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "query_start_loc")
    args = [inputs[name] for name in order]
    args[3], args[4] = args[3][None], args[4][None]
    states = (None, inputs["has_initial_state"], inputs["ssm_states"].clone(), torch.empty(2, 4, 4))
    tail = (*states, -1, torch.empty_like(inputs["u"]), torch.zeros(8 // 2 + 2, 4, 4), 2)
    torch.library.opcheck(torch.ops.tp_mamba.selective_scan.default, (*args, *tail))


def record(
    sequences: int, channels: int, k: int | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, LaunchPlan, Any]:
    """The kernel chosen for a mixer's call with 16 states, its plan, and its launch."""
    import tp_mamba.kernels.selective_scan.mixer as module

    T, N = 8 * sequences, 16
    x, bc = torch.zeros(T, 2 * channels, dtype=torch.bfloat16), torch.zeros(T, 2 * N)
    kernel, plan = (
        module.selective_scan_tiles_kernel,
        mixer_plan(sequences, channels, N, False, k, INTERPRETED),
    )
    launches = Launches()
    with monkeypatch.context() as patch:
        patch.setattr(module, "selective_scan_tiles_kernel", launches)
        patch.setattr("tp_mamba.kernels.selective_scan.operator.use_triton", lambda x: True)
        selective_scan_fn(
            x[:, :channels].t(), x[:, :channels].t(), torch.zeros(N, channels).t(), bc[:, :N].t(), bc[:, N:].t(),
            torch.zeros(channels), x[:, channels:].t(),
            query_start_loc=torch.arange(sequences + 1, dtype=torch.int32) * 8,
            cache_indices=torch.arange(sequences, dtype=torch.int32),
            has_initial_state=torch.ones(sequences, dtype=torch.bool),
            ssm_states=torch.zeros(sequences, N, channels).mT,
            save_states_every=k,
        )  # fmt: skip
    return kernel, plan, launches.calls[0]


FEW, MANY = (1, 4096), (64, 2048)
"""Sequences and channels of which four lanes share a channel, and one lane has it."""


def test_one_compilation_for_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the multiples of 16; for other steps, one for each power of two below 16 that divides them."""

    def compilations(*distances: int | None) -> int:
        launches = [record(*FEW, k, monkeypatch) for k in distances]
        return len({specialization(kernel, launch) for kernel, _, launch in launches})

    assert compilations(16, 32, 48, 64, 4096, 1 << 40) == 1
    assert compilations(*range(1, 17), 56, 61, 62, 68) == 5
    assert compilations(None, 16) == 2


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize("sizes", [FEW, (1, 8192), MANY])
def test_compiles_for_hopper_without_spills(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Saving moves no state from the registers but to its row."""
    kernel, _, launch = record(*sizes, 64, monkeypatch)
    assert stack_bytes(compile_for_hopper(kernel, launch), tmp_path) == 0


@pytest.mark.pinned_toolchain
@pytest.mark.parametrize("sizes", [FEW, MANY])
def test_instructions_of_the_loop(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without saving the loop stores its outputs and does not branch; with it, a branch per group jumps the stores."""
    loops = []
    for k in (None, 64):
        kernel, plan, launch = record(*sizes, k, monkeypatch)
        loops.append(loop_of(compile_for_hopper(kernel, launch).asm["cubin"], tmp_path))
    states = 16 // plan.lanes
    stores = plan.steps * plan.block_d // 32 // 4 if plan.lanes == 1 else 1
    plain, saving = ([line.split()[0].split(".")[0] for line in loop] for loop in loops)
    assert plain.count("STG") == stores
    assert plain.count("BRA") == 1
    assert saving.count("STG") == stores + states
    assert saving.count("BRA") == 2
    # A store and its address per state; the comparison, the counter and the next row per group.
    assert len(saving) - len(plain) <= 5 * states + 40
