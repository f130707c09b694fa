"""Which operands a kernel may read before it waits for the previous kernel.

A kernel with early start (:mod:`~tp_mamba.kernels.common.dependent_launch`) runs while the previous kernel still
writes. Before its wait it therefore reads only static operands: those that no kernel with early start writes, in any
op. What writes them (a loader, an optimizer, a copy of the slots to the device) is an ordinary kernel or a copy, which
ends before the first kernel with early start after it begins.

Each op declares its static operands next to its schema. The tests hold every kernel's machine code against its
declaration, and the ops of a decode step against one another: none writes what another has declared.
"""

from __future__ import annotations

import torch

STATIC_OPERANDS: dict[str, frozenset[str]] = {}
"""Op, such as ``tp_mamba::linear_softplus`` -> the arguments that it declared."""


def declare_static_operands(op: str, *arguments: str) -> None:
    """Declare that nothing with early start writes these arguments of the registered op ``namespace::name``.

    Raises:
        ValueError: the op has no such argument, or writes it itself.
    """
    namespace, _, name = op.partition("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    read_only = {a.name for a in schema.arguments if a.alias_info is None or not a.alias_info.is_write}
    for argument in arguments:
        if argument not in read_only:
            raise ValueError(
                f"{op}: {argument} cannot be a static operand; name an argument of the op that it does not write"
            )
    STATIC_OPERANDS[op] = frozenset(arguments)
