"""The benchmark of the server: many clients, one client, and `transformers serve` with the same weights and load."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from multiprocessing.util import Finalize
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


def serve(args: Args) -> list[Measurement]:
    """Measure the time of all answers to requests of different lengths, and the server under 64 clients."""
    if args.gpu:
        raise InputError("serve measures on the CPU only; leave --gpu out")
    config = PRESETS[args.size]
    tokenizer = load_tokenizer("gpt2", args.vocab_bpe)
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name), config, tokenizer)
        requests = draw_requests(N_REQUESTS, config, tokenizer)
        specs: dict[str, Spec] = {
            "gpt_jax": args.spec(ours, folder, "jax", requests, N_CLIENTS),
            "gpt_jax, one request at a time": args.spec(ours, folder, "jax", requests, 1),
            "gpt_torch": args.spec(ours, folder, "torch", requests, N_CLIENTS),
            "transformers serve": args.spec(theirs, folder, requests, N_CLIENTS),
            "transformers serve, one request at a time": args.spec(theirs, folder, requests, 1),
        }
        selected = args.selected(specs)
        timings, _ = interleave(selected, args.rounds, 1)
        tokens = sum(request["max_tokens"] for request in requests)
        title = f"Server: {args.size}, float32, {N_REQUESTS} requests of {N_CLIENTS} clients, "
        measurements = [Measurement(f"{title}{tokens:,} new tokens", "load", tokens, "tokens", timings)]
        for backend in ("jax", "torch"):
            if args.seconds and any(f"gpt_{backend}" in name for name in selected):
                measurements.append(_under_load(args, folder, backend, config, tokenizer))
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


def ours(folder: Path, backend: str, requests: Sequence[dict[str, Any]], n_clients: int) -> Workload:
    """scripts/serve.py."""
    return _workload(start_ours(folder, backend), requests, n_clients)


def start_ours(folder: Path, backend: str, *options: str) -> Server:
    program = [sys.executable, str(Path(__file__).parents[1] / "serve.py")]
    arguments = ["--model", str(folder), "--backend", backend, "--port", "0", *options]
    process = subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    Finalize(None, stop, (process,), exitpriority=1)  # when this process ends
    assert process.stdout is not None
    found = re.search(r"at http://(\S+)", process.stdout.readline())
    if not found:
        raise InputError(f"serve.py failed: {process.communicate()[1][-500:]}")
    return Server(process, found[1], f"{folder.name}-{backend}")


def theirs(folder: Path, requests: Sequence[dict[str, Any]], n_clients: int) -> Workload:
    """The command `transformers serve` (the extra transformers[serving])."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    process = subprocess.Popen(
        [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "error"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    Finalize(None, stop, (process,), exitpriority=1)
    server = Server(process, f"127.0.0.1:{port}", str(folder))
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            ask(server, {"prompt": "a", "max_tokens": 1})
            break
        except OSError:
            if process.poll() is not None:
                raise InputError("transformers serve ended; is the extra transformers[serving] installed?") from None
            if time.monotonic() > end:
                raise InputError("transformers serve does not answer") from None
            time.sleep(0.5)
    return _workload(server, requests, n_clients)


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()


def ask(server: Server, request: dict[str, Any]) -> str:
    """Return the text of a completion."""
    connection = HTTPConnection(server.address, timeout=START_SECONDS)
    try:
        body = json.dumps({"model": server.model, **request})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise InputError(f"the server answers {response.status}: {answer[:300]!r}")
    return json.loads(answer)["choices"][0]["text"]


def _workload(server: Server, requests: Sequence[dict[str, Any]], n_clients: int) -> Workload:
    def call() -> list[str]:
        with ThreadPoolExecutor(n_clients) as threads:
            return list(threads.map(lambda request: ask(server, request), requests))

    return Workload(call, lambda: load.resources(server.process.pid).peak, "cpu")


def _under_load(args: Args, folder: Path, backend: str, config: GPTConfig, tokenizer: Tokenizer) -> Measurement:
    spec = args.spec(ours, folder, backend, (), 1)
    os.environ.update(spec.environment)  # for the server; this process imports no framework
    server = start_ours(folder, backend)
    try:
        candidates = draw_requests(4 * N_REQUESTS, config, tokenizer)
        return load.under_load(
            f"Load: {args.size}, gpt_{backend}, {args.clients} clients for {args.seconds} s",
            server.address,
            server.model,
            server.process.pid,
            candidates,
            args.clients,
            args.seconds,
        )
    finally:
        stop(server.process)
