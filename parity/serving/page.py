"""The routes of the page: its files, and what it requests, as JSON and as server-sent events."""

import asyncio
import functools
import math
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.serving import agreement, inspect, interventions, run_views
from parity.serving.chat import chat_prompt, chat_template
from parity.serving.display import TokenTexts, rounded, show_token
from parity.serving.engine import BusyError, Engine
from parity.serving.fields import read_fields
from parity.serving.options import stop_texts
from parity.serving.respond import EventStream, answers_errors, encode
from parity.serving.rows import Progress, Row
from parity.serving.security import JsonResponse, error_response
from parity.weights import shapes
from parity.weights.load import read_folder

_STATIC = Path(__file__).parent / "static"
_MOST_WAITING = 16  # requests of a queue that are computed or wait for their turn
_SAMPLING = {
    "temperature": "a number", "top_k": "an integer", "top_p": "a number", "min_p": "a number",
    "repetition_penalty": "a number", "seed": "an integer",
}  # fmt: skip
_COMPLETION = {
    "prompt": "text",
    "messages": "a list of objects",
    "max_new_tokens": "an integer",
    "stop": "a list of texts",
    **_SAMPLING,
}
# {path: (function of a Subject, required fields, optional fields)}
VIEWS: dict[str, tuple[Callable[..., Any], dict[str, str], dict[str, str]]] = {
    "loss": (inspect.text_loss, {"text": "text"}, {}),
    "attention": (inspect.attention, {"text": "text", "layer": "an integer"}, {}),
    "lens": (inspect.lens, {"text": "text"}, {}),
    "attribution": (
        inspect.attribution,
        {"text": "text"},
        {"position": "an integer", "token": "an integer", "minus": "an integer"},
    ),
    "ablate": (
        interventions.ablate,
        {"text": "text", "layer": "an integer"},
        {"position": "an integer", "replacement": "text"},
    ),
    "patch": (
        interventions.patch,
        {"clean": "text", "corrupted": "text", "layer": "an integer"},
        {"kind": "text"},
    ),
    "logits": (inspect.next_logits, {"ids": "a list of integers"}, {"seed": "an integer"}),
}


def routes(engines: Mapping[str, Engine], runs: Sequence[Path]) -> list[BaseRoute]:
    """Return the routes of the page and of what it requests.

    Args:
        engines: {name of the model in the API: engine}.
        runs: Run folders, and folders of runs, that the page shows.
    """
    page = _Page(engines, runs)
    return [
        Route("/", lambda request: FileResponse(_STATIC / "index.html")),
        Mount("/static", StaticFiles(directory=_STATIC)),
        Route("/page/info", _answering(page.info)),
        Route("/page/vocabulary", _answering(page.vocabulary)),
        Route("/page/runs", _answering(page.runs)),
        Route("/page/run", _answering(page.run), methods=["POST"]),
        Route("/page/load", _answering(page.load), methods=["POST"]),
        Route("/page/complete", _answering(page.complete), methods=["POST"]),
        Route("/page/compare", _answering(page.compare), methods=["POST"]),
        *(Route(f"/page/{name}", _answering(page.view(*view)), methods=["POST"]) for name, view in VIEWS.items()),
    ]


Handler = Callable[[Request], Awaitable[Any]]


def _answering(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Return a route that answers with the JSON of the handler's result, or with its error."""

    @answers_errors
    async def route(request: Request) -> Response:
        result = await handler(request)
        return result if isinstance(result, Response) else JsonResponse(result)

    return route


class _Queue:
    """Computes on threads, for one request at a time."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._n_waiting = 0

    async def run(self, request: Request, function: Callable[[], Any]) -> Any:
        """Return what the function returns, after those that wait already; if the client has left before, an error."""
        if self._n_waiting >= _MOST_WAITING:
            raise BusyError
        self._n_waiting += 1
        try:
            async with self._one_at_a_time:
                if await request.is_disconnected():
                    return error_response(400, "the client left")
                return await asyncio.to_thread(function)
        finally:
            self._n_waiting -= 1


class _Page:
    """The handlers of the page's requests."""

    def __init__(self, engines: Mapping[str, Engine], folders: Sequence[Path]):
        self._engines = engines
        self._folders = folders
        engine = next(iter(engines.values()))
        self._config, self._tokenizer = engine.config, engine.tokenizer
        self._source = engine.name.removesuffix(f"-{_label(engine)}")
        self._views, self._logits, self._runs = _Queue(), _Queue(), _Queue()  # none of them delays another

    async def info(self, request: Request) -> Any:
        """What the page knows of the models."""
        models = [
            {"name": name, "label": _label(engine), "description": engine.description}
            for name, engine in self._engines.items()
        ]
        n_parameters = sum(math.prod(shape) for shape in shapes(self._config, "huggingface").values())
        return {
            "source": self._source,
            "models": models,
            "config": self._config.to_dict(),
            "parameters": n_parameters,
            "chat": all(engine.template is not None for engine in self._engines.values()),
        }

    async def vocabulary(self, request: Request) -> Any:
        """The text of every token."""
        return {"shown": [show_token(self._tokenizer, id) for id in range(self._config.n_vocab)]}

    async def complete(self, request: Request) -> Response:
        """Stream a continuation: first the ids of the prompt, then tokens as they are generated."""
        fields = read_fields(await request.body(), {"model": "text"}, _COMPLETION)
        engine = self._engine(fields["model"])
        most = fields.get("max_new_tokens", 50)
        if ("prompt" in fields) == ("messages" in fields):
            raise InputError("give either prompt or messages")
        if "prompt" in fields:
            prompt = list(encode(engine.tokenizer, fields["prompt"], engine.config.n_ctx, "prompt"))
        else:
            prompt = chat_prompt(fields["messages"], engine)
            most = min(most, engine.config.n_ctx + 1 - len(prompt))
        options: Any = {name: fields[name] for name in _SAMPLING if name in fields}
        options = {"seed": 0, **options, "row": 0, "eos_id": engine.tokenizer.eos_id}
        row = Row(prompt, most, options, stop_texts(fields.get("stop")))
        generation = engine.submit([row])
        return EventStream(completion_events(generation, prompt, engine.tokenizer), generation)

    def view(self, function: Callable[..., Any], required: Mapping[str, str], optional: Mapping[str, str]) -> Handler:
        """Return the handler of a view of one model."""
        queue = self._logits if function is inspect.next_logits else self._views

        async def handler(request: Request) -> Any:
            fields = read_fields(await request.body(), {"model": "text", **required}, optional)
            subject = self._subject(self._engine(fields.pop("model")))
            return await queue.run(request, functools.partial(function, subject, **fields))

        return handler

    async def compare(self, request: Request) -> Any:
        """Compare the logits of both backends on a text."""
        fields = read_fields(await request.body(), {"ids": "a list of integers", "first": "an integer"}, {})
        if len(self._engines) != 2:
            raise InputError("only one backend is loaded; start the server with --backend both")
        subjects = {_label(engine): self._subject(engine) for engine in self._engines.values()}
        compare = functools.partial(agreement.compare, subjects, fields["ids"], fields["first"])
        return await self._views.run(request, compare)

    async def runs(self, request: Request) -> Any:
        """The list of runs."""
        return await self._runs.run(request, lambda: {"runs": run_views.list_runs(self._folders)})

    async def run(self, request: Request) -> Any:
        """One run, or null if nothing has changed since `version`."""
        fields = read_fields(await request.body(), {"path": "text"}, {"version": "text"})

        def describe() -> Any:
            folder = run_views.find_run(self._folders, fields["path"])
            is_known = run_views.run_version(folder) == fields.get("version")
            return {"run": None if is_known else run_views.describe_run(folder)}

        return await self._runs.run(request, describe)

    async def load(self, request: Request) -> Any:
        """Replace the weights of all models by those of a checkpoint."""
        fields = read_fields(await request.body(), {"path": "text", "checkpoint": "an integer"}, {})

        def read() -> tuple[Any, str, Path, str | None]:
            run = run_views.find_run(self._folders, fields["path"])
            folder = run_views.checkpoint(run, fields["checkpoint"], self._config, self._tokenizer)
            _, arrays, format = read_folder(folder)
            return arrays, format, run, chat_template(run)

        answer = await self._views.run(request, read)
        if isinstance(answer, Response):
            return answer
        arrays, format, run, template = answer
        for engine in self._engines.values():
            await engine.call(_replace_weights, engine, arrays, format)
            engine.template = template
        self._source = f"{run.resolve().name}, step {fields['checkpoint']:,}"
        return await self.info(request)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            raise InputError(f"model must be one of {', '.join(self._engines)}, got {name!r:.60}")
        return self._engines[name]

    def _subject(self, engine: Engine) -> inspect.Subject:
        """The model of an engine, for functions on other threads: only the model itself runs on the engine's."""
        loop = asyncio.get_running_loop()
        own = inspect.Subject.of(engine.backend, engine.model, engine.tokenizer)

        def on_engine(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: asyncio.run_coroutine_threadsafe(engine.call(function, *arguments), loop).result()

        return inspect.Subject(own.config, own.tokenizer, on_engine(own.run_model), on_engine(own.export_weights))


def _label(engine: Engine) -> str:
    return engine.backend.__name__.removeprefix("gpt_")


def _replace_weights(engine: Engine, arrays: Mapping[str, np.ndarray], format: str) -> None:
    engine.backend.load_weights(engine.model, arrays, format)
    engine.weights_changed()


async def completion_events(
    generation: AsyncIterable[Progress], prompt: Sequence[int], tokenizer: Tokenizer
) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a completion; the texts of all tokens together are the text that the API returns.

    A token is withheld as long as a part of its text may become a part of a stop text.
    """
    texts = TokenTexts(tokenizer)
    withheld: deque[dict[str, Any]] = deque()
    n_certain = 0  # characters of the text so far that are not a part of a stop text, less those of yielded tokens
    yield {"prompt": prompt}
    async for progress in generation:
        withheld += ({**texts.add(token.id), "logprob": rounded(token.logprob)} for token in progress.tokens)
        n_certain += len(progress.text)
        if progress.finish_reason and withheld:
            withheld[-1]["text"] += texts.rest()
            excess = sum(len(token["text"]) for token in withheld) - n_certain
            withheld[-1]["text"] = withheld[-1]["text"][: len(withheld[-1]["text"]) - excess]
        tokens = []
        while withheld and len(withheld[0]["text"]) <= n_certain:
            n_certain -= len(withheld[0]["text"])
            tokens.append(withheld.popleft())
        yield {"tokens": tokens, "finish_reason": progress.finish_reason}
