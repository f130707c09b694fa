"""What the backwards of the operators share: whether a call is tracked, and what cannot be."""

from __future__ import annotations

import torch


def tracks_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is computed from ``tensors``."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse_in_place(op: str, **written: tuple[torch.Tensor | None, str]) -> None:
    """Raise RuntimeError for an argument that a tracked call would write in place; each comes with its remedy."""
    for name, (tensor, remedy) in written.items():
        if tensor is not None:
            raise RuntimeError(
                f"{op}: {name} is written in place, which autograd cannot follow, and an input requires grad; {remedy}"
            )


def refuse_second_derivative(op: str) -> None:
    """Register for ``op``, the backward of another operator, that it cannot be differentiated itself.

    Unregistered, torch would give wrong second derivatives after a warning.
    """
    name = op.partition("::")[2]

    def refuse(*_: object) -> None:
        raise RuntimeError(
            f"{name}: second derivatives are not available; take first derivatives, without create_graph=True"
        )

    torch.library.register_autograd(op, refuse)
