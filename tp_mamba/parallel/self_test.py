"""Whether memory that the ranks of a group share carries what is put into it: tried before anything relies on it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tp_mamba.kernels.all_reduce import Exchange, all_reduce
from tp_mamba.kernels.all_reduce.shares import (
    Shares,
    add_shares,
    send_rows,
    send_terms,
    tell_rows_sent,
    tell_terms_sent,
    wait_for_rows,
    wait_for_terms,
)
from tp_mamba.parallel import symmetric

ROUNDS = 6
"""More than a window: the last ones go through memory that has been used before."""


def failure(exchange: Exchange, shares: Shares, group: dist.ProcessGroup) -> str | None:
    """What is wrong on this rank; None where all is well. All ranks call this together.

    First every rank copies a word to every other one, and looks for theirs: that cannot hang, as a kernel would that
    waits for what never arrives. Only where all have found them, sums are tried.
    """
    device, size, rank = exchange.peers.device, exchange.size, exchange.rank
    found: str | None = None
    inboxes = symmetric.inboxes_of(exchange)
    try:
        for inbox in inboxes:
            inbox[rank].fill_(rank)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        found = f"a copy to another rank's memory failed: {str(error).partition(chr(10))[0]}"
    dist.barrier(group)
    torch.cuda.synchronize(device)
    if found is None and inboxes[rank][:size].tolist() != list(range(size)):
        found = f"ranks wrote {inboxes[rank][:size].tolist()} to its memory instead of {list(range(size))}"
    inboxes[rank][:size].fill_(255)
    torch.cuda.synchronize(device)
    failures: list[str | None] = [None] * size
    dist.all_gather_object(failures, found, group=group)
    if any(each is not None for each in failures):
        return found
    for i in range(ROUNDS):
        terms = [
            torch.arange(exchange.programs * 4096 + 7, device=device).add_(r + i).remainder_(251).float()
            for r in range(size)
        ]
        if not torch.equal(all_reduce(terms[rank], exchange), torch.stack(terms).sum(dim=0)):
            return "a sum over the ranks came out wrong"
        parts = [term[: 37 * 64].view(37, 64) for term in terms]
        for other in range(size):
            if other != rank:
                send_terms(parts[rank][shares.rows_of(other, 37)], other, 37, shares)
        tell_terms_sent(shares)
        wait_for_terms(shares)
        total = add_shares(parts[rank][shares.rows_of(rank, 37)], 37, shares)
        for other in range(size):
            if other != rank:
                send_rows(total, other, shares)
        tell_rows_sent(shares)
        wait_for_rows(shares)
        if not torch.equal(total, torch.stack(parts).sum(dim=0)):
            return "a sum by shares of rows came out wrong"
    return None
