"""The application: OpenAI's API and the page on the engines of one or two backends."""

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import parity
from parity.serving import page
from parity.serving.chat import chat_completions
from parity.serving.completions import completions
from parity.serving.engine import Engine
from parity.serving.security import HEADERS, Guard, JsonResponse, error_response


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the application."""

    api_key: str | None = None
    """Key that clients must send, except for the page's own files and /health."""
    hosts: Sequence[str] = ()
    """Names of the server, besides localhost and IP addresses, that the Host header may have."""
    runs: Sequence[Path] = ()
    """Run folders that the page shows."""
    largest_body: int = 2**21
    """Largest number of bytes of a request's body."""


PUBLIC_PATHS = ("/", "/health", "/static/*")
"""Paths that need no API key: they have no text of the model and start no computation."""


def make_app(engines: Mapping[str, Engine], options: Options) -> Starlette:
    """Return the application, which closes the engines when it ends.

    Args:
        engines: {name of the model in the API: engine}; the first is the default.
        options: The options.
    """
    started = int(time.time())

    async def health(request: Request) -> Response:
        states = {name: _state(engine) for name, engine in engines.items()}
        is_ready = all(engine.is_ready for engine in engines.values())
        content = {"status": "ok" if is_ready else "unavailable", "version": parity.__version__, "models": states}
        return JsonResponse(content, 200 if is_ready else 503)

    async def models(request: Request) -> Response:
        entries = [{"id": name, "object": "model", "created": started, "owned_by": "gpt-parity"} for name in engines]
        return JsonResponse({"object": "list", "data": entries})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for engine in engines.values():
            engine.close()

    guard = Middleware(
        Guard,
        hosts=options.hosts,
        api_key=options.api_key,
        largest_body=options.largest_body,
        public=PUBLIC_PATHS,
    )
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions(engines), methods=["POST"]),
            Route("/v1/chat/completions", chat_completions(engines), methods=["POST"]),
            *page.routes(engines, options.runs),
        ],
        middleware=[guard],
        exception_handlers={HTTPException: _http_error, Exception: _unexpected_error},
        lifespan=lifespan,
    )


def _state(engine: Engine) -> dict[str, object]:
    return {
        "ready": engine.is_ready,
        "running": engine.n_running,
        "waiting": engine.n_waiting,
        "description": engine.description,
    }


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


async def _unexpected_error(request: Request, error: Exception) -> Response:
    message = f"the server failed: {type(error).__name__}; its terminal has the details"
    return error_response(500, message, headers=HEADERS)  # which the guard does not see
