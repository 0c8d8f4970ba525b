"""Many clients at once, a third of which leave in the middle; and the benchmark of the server."""

import os

import pytest
from measure import load, serving
from support.served import engines_of, tiny_model
from support.served import serving as on_a_thread

from parity.config import GPTConfig
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer, stream_text
from parity.errors import InputError

REQUESTS = [{"prompt": chr(97 + n) * (1 + n % 9), "max_tokens": 5 + 3 * n % 20, "temperature": 0} for n in range(26)]


def test_under_load_every_answer_is_right_or_429_and_nothing_is_kept():
    with engines_of("torch", max_waiting=6) as engines, on_a_thread(engines) as address:
        host = address.removeprefix("http://")
        measurement = load.under_load("a title", host, "tiny-torch", os.getpid(), REQUESTS, 16, 1.0)
        engine = engines["tiny-torch"]
        assert (engine.n_running, engine.n_waiting) == (0, 0)
    right, resources = measurement.notes
    assert "all of them right" in right
    assert " 0 clients left" not in right
    assert " 0 answers were 429" not in right, "4 rows are decoded and 6 wait, of 16 clients"
    before, after = (int(text) for text in resources.split("MB, ")[1].split(" threads")[0].split(" and "))
    assert before == after
    files = resources.split("threads, ")[1].split(" open")[0].split(" and ")
    assert int(files[1]) <= int(files[0])
    assert len(measurement.peers["tiny-torch"].seconds) >= 3


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
