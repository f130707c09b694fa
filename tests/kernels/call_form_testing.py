"""What the tests of the call forms share: where they run, what a call does besides its operator, what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kernel_testing
import pytest
import torch
from kernel_testing import assert_within_twice, double, poisoned_like
from torch.utils._python_dispatch import TorchDispatchMode

from tp_mamba.kernels.selective_scan.reference import selective_scan_reference
from tp_mamba.kernels.selective_state_update.reference import selective_state_update_reference

PLACES = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Plain torch, the Triton kernels interpreted, and the same compiled, on sizes nearer to those of the callers."""


def device_of(place: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one of PLACES for the scan and the state update, interpreted in this process for this test.

    (The convolution's kernel calls Triton's own library, so it is interpreted in another: ``run_on``.)
    """
    if place != "interpreter":
        return torch.device(place)
    return kernel_testing.triton_device(place, monkeypatch)


class Work(TorchDispatchMode):
    """Lists the operators that a call runs beside ours, but for those that only view or allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.bytes_written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "tp_mamba" and not func.is_view and "empty" not in func.__name__:
            self.operators.append(func.__name__)
            self.bytes_written += result.numel() * result.element_size()
        return result


class Memory:
    """The bits that a call's tensors held before it, gaps and neighbours in their storage included."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        self._before = {name: _storage(x).clone() for name, x in self._tensors.items()}

    def assert_unchanged_but(self, **written: Sequence[int] | None) -> None:
        """Nothing changed but the tensors named here, or of one named with rows only those."""
        for name, x in self._tensors.items():
            now, before = (_storage(y).view(torch.uint8) for y in (x, self._before[name]))
            same = (now == before).view(-1, x.element_size()).all(1).cpu()
            if name in written:
                element = torch.arange(len(same)).as_strided(x.shape, x.stride(), x.storage_offset())
                rows = written[name]
                same[(element if rows is None else element[list(rows)]).flatten()] = True
            assert same.all(), f"{name} changed"


def copies(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments on ``device``, every tensor in a storage of its own with the strides and gaps that it had."""
    return {
        name: _storage(x).to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())
        if isinstance(x, torch.Tensor)
        else x
        for name, x in inputs.items()
    }


def _storage(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ssm_parameters(channels: Sequence[int], n: int, seed: int) -> dict[str, torch.Tensor]:
    """``A [*channels, N]`` of all decays, ``D`` and a bias for time steps from 1e-3 to 0.1, in float32."""
    g = torch.Generator().manual_seed(seed)
    return {
        "A": -torch.exp(torch.rand(*channels, n, generator=g) * 4 - 1),
        "D": torch.randn(*channels, generator=g),
        "bias": torch.rand(*channels, generator=g) * 5 - 7,
    }


def starts_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def scan_inputs(*shape: int, n: int, dtype: torch.dtype, gate: bool = True, seed: int) -> dict[str, Any]:
    """All but B and C of the scan; ``u, delta, z [*shape]`` with channels before tokens, in memory too."""
    parameters = ssm_parameters(shape[-2:-1], n, seed)
    return {
        "u": randn(*shape, seed=seed, dtype=dtype),
        "delta": randn(*shape, seed=seed + 1, dtype=dtype),
        "A": parameters["A"],
        "D": parameters["D"],
        "z": randn(*shape, seed=seed + 2, dtype=dtype) if gate else None,
        "delta_bias": parameters["bias"],
        "delta_softplus": True,
    }


def step_inputs(
    batch: int, channels: Sequence[int], n: int, dtype: torch.dtype, gate: bool, groups: int | None = None
) -> dict[str, Any]:
    """All but the state of a state update; B and C in float32, as the callers' tests have them."""
    parameters = ssm_parameters(channels, n, 31)
    bc = (batch, n) if groups is None else (batch, groups, n)
    return {
        "x": randn(batch, *channels, seed=32, dtype=dtype),
        "dt": randn(batch, *channels, seed=33, dtype=dtype),
        "A": parameters["A"],
        "B": randn(*bc, seed=34),
        "C": randn(*bc, seed=35),
        "D": parameters["D"],
        "z": randn(batch, *channels, seed=36, dtype=dtype) if gate else None,
        "dt_bias": parameters["bias"],
        "dt_softplus": True,
    }


def reference_scan(
    inputs: Mapping[str, Any], device: torch.device, **more: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference in the dtypes of ``inputs``, on the device of the kernel that is held against it.

    Over thousands of tokens a slow state multiplies as many decays, so that the rounding of ``exp`` decides its error.
    A GPU's is within 2 ulp, a CPU's within half of one.
    """
    result = selective_scan_reference(**copies(inputs, device), **more)
    assert isinstance(result, tuple)
    return result


def tie_heads(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of heads with one number each: stride 0 within a head, and A's over the states too."""
    A = inputs["A"]
    tied = {name: inputs[name][..., :1].expand(inputs[name].shape) for name in ("dt", "D", "dt_bias")}
    return inputs | tied | {"A": A[:, :1, :1].expand(A.shape)}


def check_step(
    update: Callable[..., torch.Tensor],
    inputs: dict[str, Any],
    state: torch.Tensor,
    device: torch.device,
    pad_slot_id: int,
    gives_out: bool,
) -> None:
    """One state update: its output and slots, nothing else changed, nothing copied, padded rows zero."""
    indices = inputs.get("state_batch_indices")
    slots = list(range(len(inputs["x"]))) if indices is None else indices.tolist()
    reference_state, exact_state = state.clone(), state.double()
    pad = {"pad_slot_id": pad_slot_id}
    exact = selective_state_update_reference(exact_state, **double(inputs), **pad)
    reference = selective_state_update_reference(reference_state, **inputs, **pad)

    target = {"out": poisoned_like(inputs["x"])} if gives_out else {}
    call = copies(inputs | {"state": state} | target, device)
    memory = Memory(call)
    with Work() as work, torch.no_grad():
        out = update(**call)
    assert not work.operators
    assert out is call.get("out", out)
    used = [slot for slot in slots if indices is None or slot != pad_slot_id]
    memory.assert_unchanged_but(out=None, state=used)
    real = [row for row, slot in enumerate(slots) if slot in used]
    assert out.dtype == inputs["x"].dtype
    assert_within_twice(out[real], reference[real], exact[real])
    assert_within_twice(call["state"][used], reference_state[used], exact_state[used])
    assert not out[[row for row in range(len(slots)) if row not in real]].any()
