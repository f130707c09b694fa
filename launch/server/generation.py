"""From a job's events to an answer: whole, or as a stream; and what happens when the asker goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tp_mamba.engine.request import TokenEvent
from tp_mamba.launch.server.answers import LAST_EVENT, Piece, Shape, Usage, event_of
from tp_mamba.launch.server.errors import ApiError
from tp_mamba.launch.server.service import Job

CLIENT_CLOSED_REQUEST = 499
"""The status, nginx's, of an answer that nobody waits for."""


async def whole_answer(
    request: Request, job: Job, shape: Shape, choices: int, prompt_tokens: int
) -> Response:
    """The answer in one piece, once all texts are finished; the job ends with it, or when the asker has gone.

    Raises:
        ApiError: a text failed, or the job was cut off.
    """
    work = asyncio.ensure_future(_collect(job, choices))
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        pieces = work.result()
    finally:
        work.cancel()
        gone.cancel()
        job.close()
    usage = Usage(prompt_tokens, sum(map(shape.new_tokens, pieces)))
    bodies = [shape.whole(choice, piece) for choice, piece in enumerate(pieces)]
    return JSONResponse(shape.body(bodies, usage, stream=False))


async def _collect(job: Job, choices: int) -> list[Piece]:
    pieces = [Piece() for _ in range(choices)]
    while events := await job.take():
        for choice, event in events:
            _check(event)
            pieces[choice].add(event)
    return pieces


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class StreamedAnswer(StreamingResponse):
    """The answer in pieces, as server-sent events; the job ends with it, however it ends."""

    def __init__(
        self,
        job: Job,
        shape: Shape,
        choices: int,
        prompt_tokens: int,
        *,
        tells_usage: bool,
        seconds: float,
    ) -> None:
        """Answer from ``job``; whoever does not read it within ``seconds`` is left."""
        content = _events(job, shape, choices, prompt_tokens, tells_usage)
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job, self._seconds = job, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _events(
    job: Job, shape: Shape, choices: int, prompt_tokens: int, tells_usage: bool
) -> AsyncIterator[bytes]:
    def of(bodies: Sequence[dict[str, Any] | None]) -> bytes:
        return b"".join(
            event_of(shape.body([body], None, stream=True)) for body in bodies if body is not None
        )

    if opening := of([shape.opening(choice) for choice in range(choices)]):
        yield opening
    new = 0
    try:
        while events := await job.take():
            pieces: dict[int, Piece] = {}
            for choice, event in events:
                _check(event)
                pieces.setdefault(choice, Piece()).add(event)
            new += sum(map(shape.new_tokens, pieces.values()))
            if chunk := of([shape.piece(choice, piece) for choice, piece in pieces.items()]):
                yield chunk
    except ApiError as error:
        yield event_of(error.body())
        return
    if tells_usage:
        yield event_of(shape.body([], Usage(prompt_tokens, new), stream=True))
    yield LAST_EVENT


def _check(event: TokenEvent) -> None:
    if event.finish_reason == "error":
        raise ApiError(500, event.error or "the text could not be continued: see the server's log")
