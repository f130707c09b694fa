"""The routes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tp_mamba.engine.params import SamplingParams
from tp_mamba.launch.server.answers import ChatShape, CompletionShape, Head, Shape
from tp_mamba.launch.server.body import Guard, read
from tp_mamba.launch.server.codec import Codec
from tp_mamba.launch.server.errors import ApiError, error_body, refused
from tp_mamba.launch.server.generation import StreamedAnswer, whole_answer
from tp_mamba.launch.server.logprobs import TokenTexts
from tp_mamba.launch.server.metrics import CONTENT_TYPE, Metrics
from tp_mamba.launch.server.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Sampling,
    TokenizeBody,
)
from tp_mamba.launch.server.service import Service
from tp_mamba.quoting import quoted, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Api:
    """What the routes answer with."""

    service: Service
    codec: Codec
    model: str
    """The name that requests give."""
    texts: TokenTexts = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", TokenTexts(self.codec.tokenizer))

    async def models(self) -> dict[str, Any]:
        """The one model there is."""
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """It, if it has this name."""
        self._check_model(name)
        return self._card()

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        self.service.check()
        body = await read(request, CompletionBody, self.service.limits)
        self._check_model(body.model)
        special = body.add_special_tokens is not False
        given = _valid(body.prompts, "prompt")
        ids = [
            await self.codec.prompt_ids(prompt, number, special=special)
            for number, prompt in enumerate(given)
        ]
        limit = 16 if body.max_tokens is None else body.max_tokens
        prompt_logprobs = body.logprobs if body.echo else None
        params = self._params(body, max(1, limit), logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
        echoes = (
            [(one if isinstance(one, str) else self.codec.decode(one)) for one in given] if body.echo else []
        )
        shape = CompletionShape(
            Head(self.model, "cmpl"),
            self.texts,
            [pair for pair in zip(echoes, ids, strict=True) for _ in range(body.choices)]
            if body.echo
            else None,
            logprobs=body.logprobs is not None,
            prompt_only=limit == 0,
        )
        return await self._answer(request, body, shape, [(one, params) for one in ids], sum(map(len, ids)))

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        self.service.check()
        body = await read(request, ChatBody, self.service.limits)
        self._check_model(body.model)
        messages = [_valid(message.for_template, "messages") for message in body.messages]
        variables = {"add_generation_prompt": body.add_generation_prompt is not False}
        ids = await self.codec.chat_ids(
            messages,
            special=bool(body.add_special_tokens),
            **{**(body.chat_template_kwargs or {}), **variables},
        )
        ids = await self.codec.prompt_ids(ids, 0, special=False)
        limit = self.service.limits.max_tokens if body.token_limit is None else body.token_limit
        top = (body.top_logprobs or 0) if body.logprobs else None
        params = self._params(body, limit, logprobs=top)
        shape = ChatShape(Head(self.model, "chatcmpl"), self.texts, logprobs=top is not None)
        return await self._answer(request, body, shape, [(ids, params)], len(ids))

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """The ids of a text or a conversation."""
        body = await read(request, TokenizeBody, self.service.limits)
        self._check_model(body.model)
        if body.prompt is not None:
            ids = await self.codec.encode(body.prompt, special=body.add_special_tokens is not False)
        else:
            turns = [_valid(message.for_template, "messages") for message in body.messages or ()]
            generation = body.add_generation_prompt is not False
            special = bool(body.add_special_tokens)
            ids = await self.codec.chat_ids(turns, special=special, add_generation_prompt=generation)
        tokens = [self.codec.tokenizer.id_to_token(one) for one in ids] if body.return_token_strs else None
        return {"count": len(ids), "tokens": ids, "token_strs": tokens, "max_model_len": None}

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """The text of ids."""
        body = await read(request, DetokenizeBody, self.service.limits)
        self._check_model(body.model)
        for one in body.tokens:
            if not 0 <= one < self.codec.vocab_size:
                raise refused(
                    f"tokens holds {quoted(one)}, the vocabulary has ids 0 to {self.codec.vocab_size - 1}",
                    "tokens",
                )
        return {"prompt": self.codec.decode(body.tokens)}

    async def tokenizer_info(self) -> dict[str, Any]:
        """What lm_eval asks of a tokenizer that it cannot load."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: self.codec.special_tokens.get(name) for name in names}
        size = self.codec.tokenizer.get_vocab_size(with_added_tokens=True)
        return {**special, "chat_template": self.codec.template_source, "vocab_size": size}

    async def health(self) -> Response:
        """Whether requests are taken."""
        service = self.service
        if service.state == "serving":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": service.state, **error_body(503, service.reason)}, 503)

    async def metrics(self) -> Response:
        """The numbers."""
        return PlainTextResponse(self.service.metrics.text(), media_type=CONTENT_TYPE)

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "tp-mamba"}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"the model {quoted(name)} is not served here: ask for {quoted(self.model)}",
                param="model",
                code="model_not_found",
            )

    def _params(self, body: Sampling, max_new_tokens: int, **more: Any) -> SamplingParams:
        most = self.service.limits.max_tokens
        if max_new_tokens > most:
            raise refused(
                f"{quoted(max_new_tokens)} new tokens were asked for, the server makes at most {most}",
                "max_tokens",
            )
        return _valid(lambda: body.sampling_params(max_new_tokens, **more), None)

    async def _answer(
        self,
        request: Request,
        body: Sampling,
        shape: Shape,
        prompts: list[tuple[list[int], SamplingParams]],
        prompt_tokens: int,
    ) -> Response:
        job, choices = self.service.admit(prompts), len(prompts) * body.choices
        if not body.stream:
            return await whole_answer(request, job, shape, choices, prompt_tokens)
        seconds = self.service.limits.request_seconds + 5
        return StreamedAnswer(
            job, shape, choices, prompt_tokens, tells_usage=body.tells_usage, seconds=seconds
        )


def make_app(api: Api, key: str | None = None) -> ASGIApp:
    """All routes; those that show or make anything of the model's want ``key``, if there is one."""
    app = FastAPI(title="tp-mamba", docs_url=None, redoc_url=None, openapi_url=None)
    guarded = APIRouter(dependencies=[Depends(Guard(key))])
    guarded.add_api_route("/v1/models", api.models)
    guarded.add_api_route("/v1/models/{name:path}", api.one_model)
    guarded.add_api_route("/v1/completions", api.completions, methods=["POST"], response_model=None)
    guarded.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], response_model=None)
    guarded.add_api_route("/tokenize", api.tokenize, methods=["POST"])
    guarded.add_api_route("/detokenize", api.detokenize, methods=["POST"])
    guarded.add_api_route("/tokenizer_info", api.tokenizer_info)
    app.include_router(guarded)
    app.add_api_route("/health", api.health, response_model=None)
    app.add_api_route("/metrics", api.metrics, response_model=None)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(Exception, _tell_bug)
    return _Counted(app, api.service.metrics)


async def _tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path)}"
    sentence = {
        404: f"there is no {what} here: see /v1/models, /v1/completions and /v1/chat/completions",
        405: f"{what} is not the method of this path: completions want POST, models GET",
    }.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, sentence), error.status_code, headers=error.headers)


async def _tell_bug(_: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed on this request: see its log"), 500)


class _Counted:
    """Counts answers by status, and those on their way."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answers[message["status"]] += 1
            await send(message)

        self._metrics.connections += 1
        try:
            await self._app(scope, receive, counting)
        finally:
            self._metrics.connections -= 1


def _valid(make: Callable[[], Any], param: str | None) -> Any:
    """``make()``; its ValueError is the request's fault.

    Raises:
        ApiError: 400.
    """
    try:
        return make()
    except ValueError as error:
        raise refused(shown(error, 1000), param) from None
