"""Many clients at once, a third of which leave in the middle; and the benchmark of the server."""

import gc
import os
import re
import threading
import tracemalloc

import pytest
from measure import load, serving
from support.served import engines_of, tiny_model, wait_until
from support.served import serving as on_a_thread
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from parity.config import GPTConfig
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer, stream_text
from parity.errors import InputError
from parity.serving.batch import Batch
from parity.serving.engine import BusyError
from parity.serving.rows import Generation, WaitingRow
from parity.serving.server import Protocol

REQUESTS = [{"prompt": chr(97 + n) * (1 + n % 9), "max_tokens": 5 + 3 * n % 20, "temperature": 0} for n in range(26)]


def n_kept():
    """The number of objects that servers made for requests and connections, and have not dropped."""
    gc.collect()
    kinds = (Generation, WaitingRow, Batch, Protocol, RequestResponseCycle)
    return sum(type(item) in kinds for item in gc.get_objects())


def test_under_load_every_answer_is_right_or_429_and_nothing_is_kept(monkeypatch):
    """Whenever clients begin, the engine waits until its queue was full, however fast the machine is."""
    full, run = threading.Event(), load._run
    full.set()

    def run_when_full(*arguments):
        full.clear()
        return run(*arguments)

    monkeypatch.setattr(load, "_run", run_when_full)
    with engines_of("torch", max_waiting=6) as engines, on_a_thread(engines) as address:
        engine = engines["tiny-torch"]
        submit, decode = engine.submit, engine.serving.decode

        def noting_refusals(*arguments):
            try:
                return submit(*arguments)
            except BusyError:
                full.set()
                raise

        def waiting(model, request):
            assert full.wait(60), "4 rows are decoded and 6 wait, of 16 clients"
            yield from decode(model, request)

        monkeypatch.setattr(engine, "submit", noting_refusals)
        monkeypatch.setattr(engine.serving, "decode", waiting)
        threads, n_before = set(threading.enumerate()), n_kept()
        host = address.removeprefix("http://")
        measurement = load.under_load("a title", host, "tiny-torch", os.getpid(), REQUESTS, 16, 1.0)
        assert (engine.n_running, engine.n_waiting) == (0, 0)
        assert set(threading.enumerate()) <= threads
        engine._batch = None  # the last one, which the next one replaces
        wait_until(lambda: n_kept() <= n_before)
    right, resources = measurement.notes
    assert "all of them right" in right
    numbers = re.search(r"; ([\d,]+) clients left in the middle, ([\d,]+) answers were 429", right)
    assert int(numbers[1].replace(",", "")) >= 6, "of clients 0, 3, 6, 9, 12 and 15"
    assert int(numbers[2].replace(",", "")) >= 1
    files = re.search(r"(\d+) and (\d+) open files", resources)
    assert int(files[2]) <= int(files[1])
    assert len(measurement.peers["tiny-torch"].seconds) >= 10


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_number_of_requests():
    """As Python counts it, which depends neither on the machine nor on its allocator."""
    with engines_of("torch", max_waiting=64) as engines, on_a_thread(engines) as address:
        engine, n_before, host = engines["tiny-torch"], n_kept(), address.removeprefix("http://")
        expected = load._expected(host, "tiny-torch", REQUESTS)

        def clients(rounds):
            """16 clients with a request each, of which 6 leave in the middle."""
            for number in range(rounds):
                load._run(host, "tiny-torch", expected[number % 8 :], 16, 0)
            engine._batch = None
            wait_until(lambda: n_kept() <= n_before)
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            clients(20)
            before = clients(20)
            after = clients(80)
        finally:
            tracemalloc.stop()
    assert after - before < 100 * 80 * 16  # a Generation with its rows has more than 1,000 bytes


def test_a_wrong_answer_under_load_is_an_error(monkeypatch):
    with engines_of("torch") as engines, on_a_thread(engines) as address:
        host = address.removeprefix("http://")
        expected = load._expected(host, "tiny-torch", REQUESTS)
        backend, model = tiny_model("torch")
        for request, text in expected:
            prompt = list(request["prompt"].encode())
            [row] = backend.generate(model, [prompt], request["max_tokens"], temperature=0, eos_id=256)
            ids = [id for id in row[len(prompt) :] if id != 256]
            assert text == "".join(stream_text(ByteTokenizer(), ids))
        assert len({text for _, text in expected}) > 5
        monkeypatch.setattr(load, "_expected", lambda *_: [(request, text + "!") for request, text in expected])
        with pytest.raises(InputError, match=r"a title: \d+ answers are wrong or missing, the first: .* instead of "):
            load.under_load("a title", host, "tiny-torch", os.getpid(), REQUESTS, 3, 0.2)


@pytest.mark.slow
def test_transformers_serve_gives_the_same_answers(vocab_bpe, tmp_path):
    tokenizer = GPT2Tokenizer(vocab_bpe)
    config = GPTConfig(n_ctx=64, n_embd=32, n_head=2, n_layer=2)
    folder = serving.write_model(tmp_path, config, tokenizer)
    requests = serving.draw_requests(6, config, tokenizer)
    answers = {}
    for name, start in serving.STARTS.items():
        server = start(folder, {"JAX_PLATFORMS": "cpu"})
        try:
            answers[name] = serving.clients(*server[1:], requests, 3).call()
        finally:
            serving.stop(server)
    assert answers["gpt_torch"] == answers["gpt_jax"] == answers["transformers"]
    assert all(answers["gpt_torch"])
