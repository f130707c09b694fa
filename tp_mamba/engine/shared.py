"""Requests that begin with the same tokens, which are computed once: samples of a prompt, answers to one question.

What they share is a request of its own, the context, that makes no token: it has a slot, takes its tokens in, and then
waits until each of its followers has begun with a copy of its state; the last of them takes its slot over. A context
that waits for free slots could wait for another context that does. So at least one slot is never a context's, and
followers begin before anybody who waits: whoever has that slot ends, and a follower gets it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tp_mamba.engine.params import SamplingParams
from tp_mamba.engine.request import Request
from tp_mamba.state.prefix import WORTHWHILE


def gathered(requests: Sequence[Request], shared: int) -> list[Request]:
    """What to schedule for ``requests``, whose prompts agree in their first ``shared`` tokens: one context with all of
    them as its followers, or themselves where sharing spares too little."""
    shared = min(shared, *(request.reusable for request in requests))
    if shared * (len(requests) - 1) < WORTHWHILE:
        return list(requests)
    context = Request(-1, requests[0].prompt[:shared], SamplingParams(), followers=list(requests))
    for request in requests:
        request.context = context
    return [context]
