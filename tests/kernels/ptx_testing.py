"""What a compiled kernel reads before it waits for the previous kernel, from its PTX."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tp_mamba.kernels.common.static_operands import STATIC_OPERANDS

_REGISTER = re.compile(r"%\w+")
_OF_THIS_PROGRAM = ("ld.shared", "st.shared", "cp.async.commit_group", "cp.async.wait_group")
_READS = ("ld.global", "cp.async.ca.shared.global", "cp.async.cg.shared.global", "prefetch.global.L2")
_REFUSED = (
    "ld",
    "ldu",
    "st",
    "cp",
    "red",
    "atom",
    "prefetch",
    "multimem",
    "bra",
    "brx",
    "call",
    "ret",
    "exit",
)


def read_ahead(compiled: Any) -> set[str]:
    """The names of the pointers that a kernel reads through before ``griddepcontrol.wait``.

    Fails where the PTX does not say for sure: every program must get to the one wait, without a branch before it, and
    each address that is read must come from a pointer among the kernel's arguments. Fails as well if something is
    written before the wait, or if the kernel does not start early or lets no other do so.
    """
    assert compiled.metadata.launch_pdl
    instructions = [*_instructions(compiled.asm["ptx"])]
    names = [name for _, name, _ in instructions]
    assert names.count("griddepcontrol.wait") == 1
    wait = names.index("griddepcontrol.wait")
    assert not instructions[wait][0], "the wait depends on a predicate"
    assert "griddepcontrol.launch_dependents" in names[:wait]
    assert any(name.startswith("st.global") for name in names[wait:])

    sources: dict[str, set[str | int]] = defaultdict(set)
    addresses = []
    for _, name, operands in instructions[:wait]:
        to, of = _registers(operands)
        if name.startswith("ld.param"):
            (index,) = re.findall(r"_param_(\d+)", operands)
            sources[to[0]].add(int(index))
        elif name.startswith(_READS):
            # In the last bracket. A value that was read is not traced further: it is an index, not a pointer.
            addresses.append(_REGISTER.findall(operands[operands.rindex("[") :])[0])
        elif not name.startswith(_OF_THIS_PROGRAM):
            assert name.split(".")[0] not in _REFUSED, f"before the wait: {name} {operands}"
            if not name.startswith("setp"):  # which address is taken may depend on anything
                for register in to:
                    sources[register].update(of)

    parameters = [(name, kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    read = set()
    for address in addresses:
        # Beyond the kernel's own parameters come those that Triton adds.
        origins = [parameters[index] for index in _origins(address, sources) if index < len(parameters)]
        pointers = {name for name, kind in origins if kind.startswith("*")}
        assert pointers, f"before the wait something is read at {address}, which comes from no argument"
        read |= pointers
    return read


def undeclared(compiled: Any, op: str) -> set[str]:
    """Pointers that a kernel of ``op`` reads before its wait, less the static operands that ``op`` declares."""
    return {
        pointer for pointer in read_ahead(compiled) if pointer.removesuffix("_ptr") not in STATIC_OPERANDS[op]
    }


def _instructions(ptx: str) -> Iterator[tuple[str, str, str]]:
    """Predicate or nothing, name and operands of each instruction, in the order of the text."""
    body = ptx[ptx.index(".entry") :]
    body = re.sub(r"//.*|^\s*(\$\w+:|\.\w+.*)", "", body[body.index("{") + 1 :], flags=re.MULTILINE)
    for statement in body.split(";"):
        statement = statement.lstrip("{} \t\n")
        if statement and not statement.startswith("."):
            found = re.match(r"(@!?%\w+\s+)?([a-z][\w.:]*)(.*)", statement, re.DOTALL)
            assert found, statement
            predicate, name, operands = found.groups()
            yield predicate or "", name, operands


def _registers(operands: str) -> tuple[list[str], list[str]]:
    """Those that an instruction writes, one or a ``{vector}``, and those that it reads."""
    found = re.match(r"\s*(\{[^}]*\}|[^,]*)(.*)", operands, re.DOTALL)
    assert found
    return _REGISTER.findall(found[1]), _REGISTER.findall(found[2])


def _origins(register: str, sources: dict[str, set[str | int]]) -> set[int]:
    """The indices of the parameters that a register is computed from."""
    seen: set[str | int] = set()
    left: list[str | int] = [register]
    while left:
        at = left.pop()
        if at not in seen:
            seen.add(at)
            left += sources[at] if isinstance(at, str) else ()
    return {at for at in seen if isinstance(at, int)}
