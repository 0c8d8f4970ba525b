"""Engines with small models, and servers on threads, for the tests of the server and of its page."""

import asyncio
import contextlib
import dataclasses
import functools
import importlib
import threading
import time

import httpx
import numpy as np

from parity.config import PRESETS
from parity.data.tokenizer import ByteTokenizer
from parity.loading import load_model_and_tokenizer
from parity.serving.app import Options, make_app
from parity.serving.engine import Engine
from parity.serving.server import bind, new_server
from support.models import probing_weights

SECONDS = 120  # for the start or the end of a server under load
CONFIG = dataclasses.replace(PRESETS["tiny"], n_vocab=257, n_ctx=64)


@functools.cache
def tiny_model(name):
    """(package, GPTModel) with the same weights in each backend, for the tokens of ByteTokenizer."""
    backend = importlib.import_module(f"gpt_{name}")
    model = backend.GPTModel(CONFIG)
    backend.load_weights(model, probing_weights(CONFIG, np.float32))
    return backend, model


def new_engine(name, *, backend=None, model=None, tokenizer=None, **options):
    """Return an engine of a backend, by default with the model of tiny_model; close it at the end."""
    if model is None:
        backend, model = tiny_model(name)
    serving = importlib.import_module(f"gpt_{name}.serving")
    options = {"max_batch": 4, "max_waiting": 24} | options
    return Engine(f"tiny-{name}", backend, serving, model, tokenizer or ByteTokenizer(), **options)


def run_engine(name, run, change=lambda weights: weights, **options):
    """Return an engine with the newest checkpoint of a run, whose weights `change` may replace."""
    backend = importlib.import_module(f"gpt_{name}")
    model, tokenizer, _ = load_model_and_tokenizer(backend, run)
    backend.load_weights(model, change(backend.export_weights(model)))
    return new_engine(name, backend=backend, model=model, tokenizer=tokenizer, **options)


@contextlib.contextmanager
def engines_of(*names, **options):
    """{name of the model: engine} of some backends."""
    engines = [new_engine(name, **options) for name in names]
    try:
        yield {engine.name: engine for engine in engines}
    finally:
        for engine in engines:
            engine.close()


@contextlib.contextmanager
def serving(engines, **options):
    """The address of a server on a thread, which ends with the context and closes the engines."""
    is_ready, addresses = threading.Event(), []

    def announce(address):
        addresses.append(address)
        is_ready.set()

    server = new_server(make_app(engines, Options(**options)), bind("127.0.0.1", 0), announce)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert is_ready.wait(SECONDS), "the server does not start"
        yield addresses[0]
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def ask(app, *requests, address="http://127.0.0.1:8000"):
    """Return the responses of an application to (method, path, options of httpx) that arrive at the same time."""

    async def responses():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=address, timeout=120) as client:
            sent = (client.request(method, path, **options) for method, path, options in requests)
            return await asyncio.gather(*sent)

    return asyncio.run(responses())


def complete(app, *bodies, path="/v1/completions"):
    """Return the responses of an application to bodies that arrive at the same time."""
    return ask(app, *(("POST", path, {"json": body}) for body in bodies))


def wait_until(condition):
    """Wait for what another thread does; an error after 60 seconds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
