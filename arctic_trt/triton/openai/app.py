"""The application: which path is answered by what. Imports FastAPI, and is therefore imported where it is used."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from arctic_trt.triton.openai.bodies import parse_chat, parse_completion
from arctic_trt.triton.openai.engine import Engine
from arctic_trt.triton.openai.errors import SERVER, ApiError
from arctic_trt.triton.openai.generation import Generation, Slots, check_model
from arctic_trt.triton.openai.guard import Guard
from arctic_trt.triton.openai.options import OpenAiOptions

PAGE = {
    "/": ("chat.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
}
PAGE_HEADERS = {
    # nothing from elsewhere, and no script but the page's own, whatever a model writes
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
KINDS = {404: "not_found", 405: "method_not_allowed"}


def make_app(options: OpenAiOptions, engine: Engine) -> FastAPI:
    """The application in front of ``engine``, which it closes when it ends."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    app = FastAPI(title="arctic-trt", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=options.api_key, max_request_bytes=options.max_request_bytes)
    _add_failures(app)
    _add_generation(app, options, engine)
    _add_health(app, engine)
    _add_page(app)
    return app


def _add_generation(app: FastAPI, options: OpenAiOptions, engine: Engine) -> None:
    slots = Slots(options.max_concurrent)
    chats = Generation(engine, options, slots, parse_chat, "chatcmpl-")
    completions = Generation(engine, options, slots, parse_completion, "cmpl-")
    app.router.add_route("/v1/chat/completions", chats, methods=["POST"])  # type: ignore[arg-type]  # an ASGI application
    app.router.add_route("/v1/completions", completions, methods=["POST"])  # type: ignore[arg-type]
    model = {"id": options.model, "object": "model", "created": int(time.time()), "owned_by": "arctic-trt"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name, options.model)
        return model


def _add_health(app: FastAPI, engine: Engine) -> None:
    @app.get("/health")
    async def alive() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        if not await engine.ready():
            raise ApiError(503, "The engine is not ready; ask again.", kind=SERVER, code="unavailable")
        return {"status": "ready"}


def _add_page(app: FastAPI) -> None:
    folder = files(__package__) / "page"
    for path, (name, media_type) in PAGE.items():
        response = Response((folder / name).read_bytes(), media_type=media_type, headers=PAGE_HEADERS)
        app.add_api_route(path, lambda response=response: response, methods=["GET", "HEAD"])


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def failed(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_such_thing(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path} is not offered."
        body = ApiError(error.status_code, message, code=KINDS[error.status_code]).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        body = ApiError(500, "Something is wrong in the server; its log says what.", kind=SERVER, code="internal_error").body
        return JSONResponse(body, 500)
