"""A request's body: in time, not too large, JSON, and of a known shape; and who is allowed to ask."""

from __future__ import annotations

import asyncio
import hmac
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from tp_mamba.launch.server.errors import ApiError, refused, refused_fields
from tp_mamba.launch.server.protocol import Body
from tp_mamba.launch.server.service import Limits
from tp_mamba.quoting import human_bytes, quoted

_Kind = TypeVar("_Kind", bound=Body)


async def read(request: Request, kind: type[_Kind], limits: Limits) -> _Kind:
    """The body of ``request`` as a ``kind``.

    Raises:
        ApiError: 400, 408, 413 or 415.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # A web page may make a browser send any other type here without asking first.
        raise ApiError(
            415,
            f"the content type is {quoted(content_type)}: send JSON, with 'Content-Type: application/json'",
        )
    content = await _bytes_of(request, limits)
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise refused_fields(error) from None
    except (ValueError, RecursionError) as error:
        raise refused(f"the body cannot be read ({type(error).__name__}): send one JSON object") from None


async def _bytes_of(request: Request, limits: Limits) -> bytes:
    most = limits.max_request_bytes
    too_large = ApiError(
        413,
        f"the body is larger than {human_bytes(most)}: divide the request up",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                content += piece
                if len(content) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.body_seconds:g} s: send it faster",
            headers={"Connection": "close", "x-should-retry": "false"},
        ) from None
    except ClientDisconnect:
        raise refused("the connection was closed before the body was complete") from None
    return bytes(content)


class Guard:
    """Lets in whoever knows the key; everybody, where there is none."""

    def __init__(self, key: str | None) -> None:
        self._key = None if key is None else key.encode()

    async def __call__(self, request: Request) -> None:
        """Refuse a stranger; takes as long for every wrong key of one length.

        Raises:
            ApiError: 401.
        """
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are latin-1, in which every byte is a character.
        if (
            not hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
            or scheme.lower() != "bearer"
        ):
            raise ApiError(
                401,
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
