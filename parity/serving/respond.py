"""From the rows of a request to a response, whole or streamed; decoding stops when the client leaves."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.serving.engine import BusyError, ClosedError, Engine, FailedError
from parity.serving.options import MOST_ROWS, OptionError, Sampling
from parity.serving.rows import FinishReason, Generation, Row
from parity.serving.security import JsonResponse, error_response
from parity.serving.text import Token
from parity.storage.json import as_object, parse

Result = TypeVar("Result")
RETRY_SECONDS = 1
"""What the header Retry-After says to clients that are refused because too many wait."""


class Style(Protocol):
    """How an endpoint writes its answers."""

    object_name: str
    """Value of `object` in whole answers."""
    chunk_name: str
    """Value of `object` in the events of a stream."""
    id_prefix: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the first choice of a stream for a row, or None if it begins with the model's text."""

    def part(self, index: int, text: str, tokens: Sequence[Token], reason: FinishReason | None) -> dict[str, Any]:
        """Return a choice of a stream."""

    def whole(self, index: int, text: str, tokens: Sequence[Token], reason: FinishReason | None) -> dict[str, Any]:
        """Return a choice of a whole answer."""


async def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request."""
    return as_object(parse(await request.body(), "the body"), "the body")


def choose_engine(engines: Mapping[str, Engine], body: Mapping[str, Any]) -> Engine:
    """Return the engine that `model` names, or the first one if there is no such option."""
    name = body.get("model")
    if name is None:
        return next(iter(engines.values()))
    if not isinstance(name, str) or name not in engines:
        raise UnknownModelError(f"model must be one of {', '.join(engines)}, got {name!r:.80}", "model")
    return engines[name]


def check_number(n_prompts: int, n: int, engine: Engine) -> None:
    """Raise OptionError for more continuations than a request may have, which could never wait for their places."""
    most = min(MOST_ROWS, engine.max_waiting)
    if n_prompts * n > most:
        raise OptionError(f"{n_prompts} prompts with n={n} are more than {most} completions", "n")


class UnknownModelError(OptionError):
    """`model` names none of the models."""


def answers_errors(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return a route whose errors become responses in the form of the API."""

    async def guarded(request: Request) -> Response:
        try:
            return await route(request)
        except UnknownModelError as error:
            return error_response(404, str(error), param=error.param, code="model_not_found")
        except OptionError as error:
            return error_response(400, str(error), param=error.param)
        except InputError as error:
            return error_response(400, str(error))
        except FailedError as error:
            return error_response(500, str(error))
        except (BusyError, ClosedError) as error:
            return unavailable(error)

    return guarded


def unavailable(error: BusyError | ClosedError) -> Response:
    """Return the response to a request for which there is no place."""
    if isinstance(error, ClosedError):
        return error_response(503, "the server is shutting down", code="unavailable")
    message = f"too many requests wait already; try again in {RETRY_SECONDS} s"
    return error_response(429, message, code="busy", headers={"Retry-After": str(RETRY_SECONDS)})


async def respond(
    request: Request, engine: Engine, style: Style, rows: Sequence[Row], sampling: Sampling, n_top: int, n_prompt: int
) -> Response:
    """Decode the rows, and return the response.

    Args:
        request: The request, whose body was read.
        engine: The engine that decodes.
        style: How the endpoint writes its answers.
        rows: The rows of the answer; choice i is row i.
        sampling: The options that concern the form of the answer: stream, include_usage, seed.
        n_top: Number of most likely tokens to show for each token.
        n_prompt: Number of tokens of the prompts, for the usage.
    """
    generation = engine.submit(rows, n_top)
    head = head_of(style, engine, sampling)
    if sampling.stream:
        return EventStream(_events(generation, style, head, n_prompt, sampling.include_usage), generation)
    try:
        answer = await until_disconnect(request, _collect(generation))
    finally:
        generation.cancel()
    if answer is None:
        return error_response(400, "the client left")
    choices = [style.whole(index, *parts) for index, parts in enumerate(answer)]
    return JsonResponse(head | {"choices": choices, "usage": usage(n_prompt, sum(len(row[1]) for row in answer))})


def head_of(style: Style, engine: Engine, sampling: Sampling) -> dict[str, Any]:
    """Return what whole answers and the events of a stream begin with."""
    return {
        "id": f"{style.id_prefix}-{secrets.token_hex(12)}",
        "object": style.chunk_name if sampling.stream else style.object_name,
        "created": int(time.time()),
        "model": engine.name,
        "seed": sampling.seed,
    }


def sampled_row(prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, number: int) -> Row:
    """Return the row with this number among those of a request, on which its random numbers depend."""
    return Row(prompt, max_new_tokens, {**sampling.rules, "seed": sampling.seed, "row": number}, sampling.stop)


Answer = tuple[str, list[Token], FinishReason | None]
"""Text, tokens and finish reason of a row."""


async def _collect(generation: Generation) -> list[Answer]:
    texts: list[list[str]] = [[] for _ in generation.rows]
    tokens: list[list[Token]] = [[] for _ in generation.rows]
    reasons: list[FinishReason | None] = [None for _ in generation.rows]
    async for progress in generation:
        texts[progress.row].append(progress.text)
        tokens[progress.row] += progress.tokens
        reasons[progress.row] = progress.finish_reason
    return [("".join(parts), *rest) for parts, *rest in zip(texts, tokens, reasons, strict=True)]  # type: ignore[misc]


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return the result of `work`, or cancel it and return None if the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def usage(n_prompt: int, n_completion: int) -> dict[str, int]:
    """Return the numbers of tokens in the form of the API."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
    }


async def _events(
    generation: Generation, style: Style, head: dict[str, Any], n_prompt: int, include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    n_completion = 0
    for index in range(len(generation.rows)):
        if (choice := style.opening(index)) is not None:
            yield head | {"choices": [choice]}
    async for progress in generation:
        n_completion += len(progress.tokens)
        yield head | {"choices": [style.part(*progress)]}
    if include_usage:
        yield head | {"choices": [], "usage": usage(n_prompt, n_completion)}


class EventStream(StreamingResponse):
    """Server-sent events, one JSON object each, then [DONE]. The generation is cancelled when the client leaves."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], generation: Generation):
        super().__init__(_lines(events), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if the client left before the first event was made
            self._generation.cancel()


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"
    except Exception as error:  # the status of the response was sent already
        message = str(error) if isinstance(error, FailedError) else f"the server failed: {type(error).__name__}"
        if isinstance(error, ClosedError):
            message = "the server is shutting down"
        body = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        yield f"data: {json.dumps(body)}\n\n"
        return
    yield "data: [DONE]\n\n"


def encode(tokenizer: Tokenizer, text: str, n_ctx: int, name: str) -> Sequence[int]:
    """Return the ids of a prompt; raises OptionError for a text that cannot fit into the context.

    The longest tokens have LONGEST_TOKEN bytes, so that a text which is too long for them need not be encoded.
    """
    if len(text.encode(errors="replace")) > LONGEST_TOKEN * (n_ctx + 1):
        raise OptionError(f"{name} is longer than the model's context of {n_ctx} tokens", name)
    return tokenizer.encode(text) or [tokenizer.eos_id]


LONGEST_TOKEN = 128
"""Number of bytes of the longest tokens of GPT-2's vocabulary."""
