"""AdamW over the master parameters that a rank holds, its learning rate, and the norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tp_mamba.training.data_parallel import Master
from tp_mamba.training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, in torch's names."""


def make_optimizer(
    masters: Sequence[Master], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in two groups: those that decay, and A_log, D, biases and norms, which do not."""
    groups = [
        {"params": [m.local for m in masters if m.decays], "weight_decay": weight_decay},
        {"params": [m.local for m in masters if not m.decays], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    for master in masters:  # made now, so that a checkpoint holds and fills them before the first step
        state = optimizer.state[master.local]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.local.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(master.local)
    return optimizer


def set_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Let the next update be number ``step + 1``."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def learning_rate(
    step: int, *, peak: float, least: float, warmup: int, steps: int, time_spent: float = 0.0
) -> float:
    """Of update number ``step``, from 1: a linear warm-up to ``peak``, then half a cosine to ``least`` at ``steps``.

    Args:
        time_spent: the share of the time there is that is over; the cosine is at least as far.
    """
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, max((step - warmup) / max(1, steps - warmup), time_spent))
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Use ``lr`` in the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norms(
    masters: Sequence[Master], ranks: Ranks, also: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of each gradient over all ranks, float64 ``[parameters]`` on the CPU, and the sum of ``also`` over them.

    A part that several ranks hold is counted once. One collective, and the host waits for it.

    Args:
        also: a vector of each rank, to be summed in the same collective.
    """
    device = masters[0].local.device
    squares = torch.stack([_square(master, ranks, device) for master in masters])
    summed = ranks.world.all_reduce_(torch.cat([squares, also.to(squares)]))
    norms, rest = summed.cpu().split([len(squares), len(also)])
    return norms.sqrt(), rest


def _square(master: Master, ranks: Ranks, device: torch.device) -> torch.Tensor:
    counts = (master.over_data or ranks.dp.rank == 0) and (master.shard.dim is not None or ranks.tp.rank == 0)
    grad = master.local.grad
    if grad is None or not counts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.linalg.vector_norm(grad).double().square()


def clip_gradients(masters: Sequence[Master], norm: float, largest: float) -> None:
    """Scale all gradients so that their norm, ``norm``, is at most ``largest``; as ``clip_grad_norm_`` does."""
    scale = largest / (norm + 1e-6)
    if scale < 1:
        torch._foreach_mul_([m.local.grad for m in masters if m.local.grad is not None], scale)
