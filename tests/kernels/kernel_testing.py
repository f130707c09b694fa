"""Helpers for tests of the state-space kernels: where they run, error bounds, poisoned outputs, compilation."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_interpreter import repair

DEVICES = [pytest.param("interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Where a Triton kernel is tested: in Triton's interpreter on the CPU, and compiled on a GPU."""

TIME_STEPS = [-30.0, -16.0, -1.0, 5.5, 10.5, 19.5, 20.5, 89.0, 100.0]
"""Sums of delta and bias on which softplus can go wrong.

Far below zero ``log(1 + exp(x))`` loses every digit (a third of the value at -16). A passthrough that begins
before 20 is off by 7e-4 of the value at 5.5 and by 3e-6 at 10.5, both many times the rounding of float32. From
89 on, ``exp`` is infinite."""

ROOT = Path(__file__).resolve().parents[2]


def triton_modules() -> list[str]:
    """Every module of the kernels that Triton compiles something of, wherever it stands."""
    files = sorted((ROOT / "kernels").rglob("*.py"))
    found = [file for file in files if re.search(r"^import triton", file.read_text(), re.MULTILINE)]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in found]
    assert len(names) > 10
    return [f"tp_mamba.{name}" for name in names]


TRITON_MODULES = triton_modules()


def triton_device(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one of DEVICES; for the interpreter, with the kernels' modules replaced for this test.

    Triton decides at import whether a kernel is interpreted, so the modules are imported anew under the variable;
    monkeypatch puts the old ones back.
    """
    if name == "cuda":
        return torch.device("cuda")
    importlib.import_module("triton.language")  # its own functions are for the compiler, whatever comes first
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    repair()
    replace_modules(TRITON_MODULES, monkeypatch)
    return torch.device("cpu")


def replace_modules(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Import ``modules`` anew, for this test."""
    for module in modules:
        # setitem first: it remembers what to restore, also where there was nothing.
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, module)
        # An import sets the package's attribute: what to restore is remembered before it.
        package, _, attribute = module.rpartition(".")
        folder = importlib.import_module(package)
        monkeypatch.setattr(folder, attribute, getattr(folder, attribute, None), raising=False)
    for module in modules:
        importlib.import_module(module)


def to(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors among ``inputs`` on ``device`` with the same strides and offset (``Tensor.to`` would compact)."""

    def move(x: torch.Tensor) -> torch.Tensor:
        storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` with the floating tensors in float64."""
    floating = {
        name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    return inputs | {name: x.double() for name, x in floating.items()}


def assert_within_twice(
    actual: torch.Tensor,
    reference: torch.Tensor,
    exact: torch.Tensor,
    approximate: float = 0.0,
    worst: float = 4.0,
) -> None:
    """``actual`` errs, against the float64 ``exact``, at most twice as much as ``reference`` in its dtype does.

    In the norm, every element's error taken relative to its size plus the typical size, so that a few large elements
    do not decide; and in the worst element, with ``worst`` ulp of the largest value on top, because the worst of a few
    is a matter of luck (and exponential and division are allowed 2 ulp each on a GPU). ``approximate``: float32 ulp, on
    the average of the elements, that those two add where they make up the result instead of entering long sums.
    """
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    error, allowed = (actual.cpu().double() - exact).abs(), (reference.cpu().double() - exact).abs()
    bound = 2 * allowed.max() + worst * torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error.max() <= bound, f"largest error {error.max():.3e} > {bound:.3e}"
    size = exact.abs() + exact.square().mean().sqrt() + torch.finfo(exact.dtype).tiny
    error, allowed = error / size, allowed / size
    bound = 2 * allowed.norm() + approximate * torch.finfo(torch.float32).eps * exact.numel() ** 0.5
    assert error.norm() <= bound, f"norm of the error {error.norm():.3e} > {bound:.3e}"


def poisoned_like(x: torch.Tensor) -> torch.Tensor:
    """A tensor laid out as ``x`` and full of NaN: an element that is not written shows."""
    return torch.full_like(x, float("nan"))


class Launches:
    """Stands in for a kernel: ``kernel[grid](*args, **kwargs)`` is recorded, not run."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def _bind(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    return bind(*args, **kwargs)


def specialization(kernel: Any, launch: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """What Triton's JIT looks a compiled kernel up by: equal for two launches means one compilation."""
    _, keys, options = _bind(kernel, *launch)
    return f"{keys} {sorted(options.items())}"


def compile_for_hopper(kernel: Any, launch: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The kernel of a recorded launch, compiled for sm_90; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    bound, keys, options = _bind(kernel, *launch)
    signature = {name: key[0] for name, key in zip(bound, keys, strict=True)}
    constants = {name: bound[name] for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_as_launched(kernel: Any, launch: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """As :func:`compile_for_hopper`, but as the JIT does it: knowing which arguments are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", 90, 32)
    bound, keys, options = _bind(kernel, *launch)
    signature = {name: key[0] for name, key in zip(bound, keys, strict=True)}
    constants = {name: bound[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = [
        i for i, (kind, key) in enumerate(keys) if kind != "constexpr" and isinstance(key, str) and key
    ]
    attributes = {(i,): make_backend(target).parse_attr(keys[i][1]) for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def stack_bytes(compiled: Any, folder: Path) -> int:
    """Bytes of local memory a thread of a compiled kernel uses, where spilled registers would be."""
    return _usage(compiled, folder, "STACK")


def registers(compiled: Any, folder: Path) -> int:
    """Registers a thread of a compiled kernel has."""
    return _usage(compiled, folder, "REG")


def _usage(compiled: Any, folder: Path, resource: str) -> int:
    report = _cuobjdump(compiled, folder, "-res-usage")
    found = re.search(rf"{resource}:(\d+)", report)
    assert found, report
    return int(found[1])


def sass_of(compiled: Any, folder: Path) -> list[str]:
    """Instructions of a compiled kernel, opcodes with their suffixes."""
    listing = _cuobjdump(compiled, folder, "-sass")
    return re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?(\w[\w.]*)", listing)


def _cuobjdump(compiled: Any, folder: Path, option: str) -> str:
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout
