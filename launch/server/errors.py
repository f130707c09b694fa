"""Errors as OpenAI's clients read them: a status, and one sentence in an object of a known shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tp_mamba.quoting import quoted, shown

_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """An answer that is an error; its text is one sentence with the remedy."""

    def __init__(
        self,
        status: int,
        sentence: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``param`` is the field it is about, ``code`` a word that programs know, both as OpenAI has them."""
        super().__init__(sentence)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The object that the client is sent."""
        return error_body(self.status, str(self), param=self.param, code=self.code)


def error_body(
    status: int, sentence: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """``{"error": {...}}``, with the type that goes with ``status``."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": sentence, "type": kind, "param": param, "code": code}}


def refused(sentence: str, param: str | None = None) -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(400, sentence, param=param)


def refused_fields(error: ValidationError) -> ApiError:
    """The first thing that pydantic found wrong, in one sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = _path(first["loc"])
    if first["type"] == "json_invalid":
        return refused(f"the body is not JSON that can be read ({shown(first['msg'])}): send one JSON object")
    if first["type"] in ("model_type", "model_attributes_type"):
        return refused(
            'the body is not a JSON object: send one, as in {"model": ..., "prompt": ...}', where or None
        )
    if first["type"] == "extra_forbidden":
        return refused(f"{where} is no field of this request: leave it out", where)
    if first["type"] == "missing":
        return refused(f"{where} is missing: this request needs it", where)
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return refused(text, where or None)
    return refused(f"{where} is {quoted(first['input'])}: {text[:1].lower()}{text[1:]}", where or None)


def _path(parts: Sequence[int | str]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return shown(text)
