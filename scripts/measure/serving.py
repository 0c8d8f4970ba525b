"""The benchmark of the server: many clients, one client, and `transformers serve` with the same weights and load."""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np

from measure import load
from measure.args import Args
from measure.report import Measurement
from measure.timing import Spec, Workload, interleave
from parity import weights
from parity.config import PRESETS, GPTConfig
from parity.data.tokenizer import Tokenizer, load_tokenizer
from parity.errors import InputError
from parity.hub import save_model

N_REQUESTS = 32
N_CLIENTS = 16
START_SECONDS = 600
"""A server has so long to answer its first request."""


class Server(NamedTuple):
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    address: str
    """host:port"""
    model: str
    """Name of the model for requests."""
    pid: int


def serve(args: Args) -> list[Measurement]:
    """Measure the time of all answers to requests of different lengths, and the server under many clients."""
    if args.gpu:
        raise InputError("serve measures on the CPU only; leave --gpu out")
    config = PRESETS[args.size]
    tokenizer = load_tokenizer("gpt2", args.vocab_bpe)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = write_model(Path(name), config, tokenizer)
        requests = draw_requests(N_REQUESTS, config, tokenizer)
        servers: dict[str, Server] = {}

        def clients_of(peer: str, n_clients: int) -> Spec:
            """The clients of a server, which is started for its first peer."""
            try:
                if peer not in servers:
                    servers[peer] = STARTS[peer](folder, args.spec(clients).environment)
                    stack.callback(stop, servers[peer])
            except InputError as error:
                return args.spec(failed, str(error))
            return args.spec(clients, *servers[peer][1:], requests, n_clients)

        names = {
            "gpt_jax": ("gpt_jax", N_CLIENTS),
            "gpt_jax, one request at a time": ("gpt_jax", 1),
            "gpt_torch": ("gpt_torch", N_CLIENTS),
            "transformers serve": ("transformers", N_CLIENTS),
            "transformers serve, one request at a time": ("transformers", 1),
        }
        selected = args.selected({name: args.spec(clients) for name in names})
        timings, _ = interleave({name: clients_of(*names[name]) for name in selected}, args.rounds, 1)
        tokens = sum(request["max_tokens"] for request in requests)
        title = f"Server: {args.size}, float32, {N_REQUESTS} requests of {N_CLIENTS} clients, {tokens:,} new tokens"
        measurements = [Measurement(title, "load", tokens, "tokens", timings)]
        candidates = draw_requests(4 * N_REQUESTS, config, tokenizer)
        for peer in ("gpt_jax", "gpt_torch"):
            if args.seconds and peer in servers:
                title = f"Load: {args.size}, {peer}, {args.clients} clients for {args.seconds} s"
                measurements.append(load.under_load(title, *servers[peer][1:], candidates, args.clients, args.seconds))
    return measurements


def write_model(folder: Path, config: GPTConfig, tokenizer: Tokenizer) -> Path:
    """Write random weights and GPT-2's tokenizer, for transformers as well; return the folder."""
    save_model(folder / "model", config, dict(weights.initial_weights(config, seed=0)), tokenizer)
    return folder / "model"


def draw_requests(count: int, config: GPTConfig, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Draw requests with 8 to 64 tokens of Python's documentation and 16 to 64 new tokens, always the most likely."""
    generator = np.random.default_rng(0)
    ids = tokenizer.encode_array(" ".join(topics[name] for name in sorted(topics))[:400_000])
    longest = min(64, config.n_ctx // 2)
    requests = []
    for _ in range(count):
        length = int(generator.integers(min(8, longest - 1), longest))
        start = int(generator.integers(0, len(ids) - length))
        prompt = tokenizer.decode(ids[start : start + length].tolist())
        n_new = int(generator.integers(min(16, longest - 1), longest))
        requests.append({"prompt": prompt, "max_tokens": n_new, "temperature": 0})
    return requests


def start_ours(backend: str, folder: Path, environment: Mapping[str, str]) -> Server:
    """Start scripts/serve.py."""
    program = [sys.executable, str(Path(__file__).parents[1] / "serve.py")]
    process = subprocess.Popen(
        [*program, "--model", str(folder), "--backend", backend, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"at http://(\S+)", process.stdout.readline())
    if not found:
        raise InputError(f"serve.py failed: {process.communicate()[1][-500:]}")
    return Server(process, found[1], f"{folder.name}-{backend}", process.pid)


def start_transformers(folder: Path, environment: Mapping[str, str]) -> Server:
    """Start the command `transformers serve` (the extra transformers[serving])."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    process = subprocess.Popen(
        [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "error"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    server = Server(process, f"127.0.0.1:{port}", str(folder), process.pid)
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            ask(server.address, server.model, {"prompt": "a", "max_tokens": 1})
            return server
        except OSError:
            if process.poll() is not None:
                raise InputError("transformers serve ended; is the extra transformers[serving] installed?") from None
            if time.monotonic() > end:
                stop(server)
                raise InputError("transformers serve does not answer") from None
            time.sleep(0.5)


STARTS: dict[str, Callable[[Path, Mapping[str, str]], Server]] = {
    "gpt_jax": functools.partial(start_ours, "jax"),
    "gpt_torch": functools.partial(start_ours, "torch"),
    "transformers": start_transformers,
}


def stop(server: Server) -> None:
    server.process.terminate()
    server.process.communicate()


def ask(address: str, model: str, request: dict[str, Any]) -> str:
    """Return the text of a completion."""
    connection = HTTPConnection(address, timeout=START_SECONDS)
    try:
        body = json.dumps({"model": model, **request})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise InputError(f"the server answers {response.status}: {answer[:300]!r}")
    return json.loads(answer)["choices"][0]["text"]


def clients(address: str, model: str, pid: int, requests: Sequence[dict[str, Any]], n_clients: int) -> Workload:
    """All answers to the requests, of several clients at the same time."""

    def call() -> list[str]:
        with ThreadPoolExecutor(n_clients) as threads:
            return list(threads.map(lambda request: ask(address, model, request), requests))

    return Workload(call, lambda: load.resources(pid).peak, "cpu")


def failed(reason: str) -> Workload:
    raise InputError(reason)
