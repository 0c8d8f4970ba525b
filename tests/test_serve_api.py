"""The API in one process: the same text as generate(), every option, and what is refused."""

import asyncio
import dataclasses
import json
import threading

import httpx
import numpy as np
import pytest
from support import served
from support.served import CONFIG, ask, complete, engines_of, tiny_model

from parity.data.tokenizer import ByteTokenizer, stream_text
from parity.generation import check_finite
from parity.serving import chat as served_chat
from parity.serving.app import Options, make_app
from parity.serving.options import LACKING, MOST_ROWS, MOST_STOPS
from parity.serving.rows import Generation, Row, WaitingRow
from parity.serving.security import HEADERS
from parity.tuning.records import Conversation, Turn
from parity.tuning.template import render

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id


@pytest.fixture(scope="module")
def engines():
    with engines_of("torch", "jax") as engines:
        yield engines


@pytest.fixture(scope="module")
def app(engines):
    return make_app(engines, Options())


@pytest.fixture(params=["torch", "jax"])
def name(request):
    return f"tiny-{request.param}"


def text_of(ids):
    return "".join(stream_text(TOKENIZER, ids))


def generated(prompts, n_new, **options):
    """{(prompt, sample): new ids} of generate() in torch; tests of generate() show that gpt_jax has the same."""
    backend, model = tiny_model("torch")
    rows = backend.generate(model, prompts, n_new, eos_id=EOS, **options)
    samples = options.get("samples", 1)
    new = [row[len(prompts[index // samples]) :] for index, row in enumerate(rows)]
    return [ids[:-1] if ids[-1] == EOS else ids for ids in new]


def answer(response):
    assert response.status_code == 200, response.text
    return response.json()


def texts(response):
    choices = answer(response)["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def error(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


def events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_requests_of_the_same_moment_have_the_text_of_generate(app, name):
    bodies = [
        {"prompt": "Hello", "max_tokens": 20, "seed": 1, "n": 2},
        {"prompt": "The quick brown fox", "max_tokens": 7, "temperature": 0},
        {"prompt": [1, 2, 250], "max_tokens": 13, "seed": 5, "temperature": 0.7, "top_p": 0.9},
        {"prompt": ["a", "bc"], "max_tokens": 9, "seed": 2**40, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.3},
        {"prompt": "x", "max_tokens": 1, "seed": 0},
    ]
    responses = complete(app, *({"model": name, **body} for body in bodies))
    for body, response in zip(bodies, responses, strict=True):
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        ids = [prompts] if isinstance(prompts[0], int) else [list(text.encode()) for text in prompts]
        options = {key: body[key] for key in body.keys() - {"prompt", "max_tokens", "n"}}
        expected = generated(ids, body["max_tokens"], samples=body.get("n", 1), **options)
        assert texts(response) == list(map(text_of, expected))


def test_every_form_of_a_prompt(app):
    options = {"max_tokens": 4, "seed": 3}
    forms = ["ab", [97, 98], ["ab"], [[97, 98]], ["ab", "cd"], [[97, 98], [99, 100]], ["ab", [99, 100]]]
    answers = [texts(response) for response in complete(app, *({"prompt": form, **options} for form in forms))]
    assert answers[0] == answers[1] == answers[2] == answers[3] == answers[4][:1]
    assert answers[4] == answers[5] == answers[6]
    forms = [None, "", "<|endoftext|>", [EOS], ["<|endoftext|>"], [""], [[EOS]]]
    answers = [texts(response) for response in complete(app, *({"prompt": form, **options} for form in forms))]
    assert answers == answers[:1] * len(forms)


def test_defaults_are_those_of_the_api(app):
    body = answer(complete(app, {"prompt": "a"})[0])
    assert body["model"] == "tiny-torch", "the first model"
    backend, model = tiny_model("torch")
    [row] = backend.generate(model, [[97]], 16, seed=body["seed"], eos_id=EOS)  # the seed is in the answer
    is_ended = row[-1] == EOS
    n_new = len(row) - 1
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": n_new, "total_tokens": 1 + n_new}
    text = text_of(row[1:-1] if is_ended else row[1:])
    reason = "stop" if is_ended else "length"
    assert body["choices"] == [{"text": text, "index": 0, "logprobs": None, "finish_reason": reason}]
    seeds = {answer(response)["seed"] for response in complete(app, *[{"max_tokens": 1}] * 4)}
    assert len(seeds) == 4


def test_null_and_the_defaults_of_lacking_options_are_the_same_as_none(app):
    nulls = dict.fromkeys([*LACKING, "temperature", "stop", "logprobs", "n", "stream", "stream_options"])
    defaults = {name: values[0] for name, values in LACKING.items() if values}
    options = {"prompt": "ab", "seed": 1, "max_tokens": 5}
    plain, null, default = (texts(r) for r in complete(app, options, options | nulls, options | defaults))
    assert plain == null == default


@pytest.mark.parametrize("option", LACKING)
def test_options_that_the_server_lacks_are_refused_by_name(app, option):
    for value in (3, True):
        found = error(complete(app, {"prompt": "a", option: value})[0])
        assert found["param"] == option
        assert found["message"] == f"this server does not have the option {option}; leave it out"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"temperatur": 1}, "temperatur", "unknown option 'temperatur'; the options are echo, "),
        ({"temperature": -1}, "temperature", "temperature must be 0 (greedy) or positive, got -1"),
        ({"temperature": "1"}, "temperature", "temperature must be a number, got '1'"),
        ({"temperature": 10**400}, "temperature", "temperature must be"),
        ({"top_p": 0}, "top_p", "top_p must be in"),
        ({"top_p": True}, "top_p", "top_p must be a number, got True"),
        ({"top_k": 0}, "top_k", "top_k must be in 1..257, got 0"),
        ({"top_k": 2.5}, "top_k", "top_k must be in 1..257, got 2.5"),
        ({"min_p": 2}, "min_p", "min_p must be in"),
        ({"n": 0}, "n", "n must be an integer in 1..128, got 0"),
        ({"n": 25}, "n", "1 prompts with n=25 are more than 24 completions"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, except with echo"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens must be an integer in 0..2147483647, got 1.5"),
        (
            {"max_tokens": 65},
            None,
            "the prompt has 1 tokens and 65 more were requested, but the model's context has 64",
        ),
        ({"seed": -1}, "seed", "seed must be an integer in 0..9223372036854775807, got -1"),
        ({"logprobs": 21}, "logprobs", "logprobs must be an integer in 0..20, got 21"),
        ({"logprobs": True}, "logprobs", "logprobs must be an integer"),
        ({"echo": 1}, "echo", "echo must be true or false, got 1"),
        ({"stream": "yes"}, "stream", "stream must be true or false, got 'yes'"),
        ({"stream_options": {}}, "stream_options", "stream_options needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, None, "this server does not have the option stream_options.x"),
        ({"stop": ""}, "stop", "stop: each text needs 1..1000 characters"),
        ({"stop": [1]}, "stop", "stop must be a text or a list of up to 16 texts"),
        ({"stop": ["a"] * (MOST_STOPS + 1)}, "stop", "stop must be a text or a list of up to 16 texts"),
        ({"prompt": []}, "prompt", "prompt must be a text, a list of token ids, or a list of 1 to 128 of either"),
        ({"prompt": 7}, "prompt", "prompt must be a text"),
        ({"prompt": ["a"] * (MOST_ROWS + 1)}, "prompt", "prompt must be a text"),
        ({"prompt": ["a", []]}, "prompt", "prompt 1 must be a text or a list of token ids that is not empty"),
        ({"prompt": [[1, True]]}, "prompt", "prompt 0 must be a text or a list of token ids"),
        ({"prompt": [257]}, "prompt", "prompt: each token id must be in 0..256"),
        ({"prompt": "x" * 65}, "prompt", "prompt has 65 tokens, but the model's context has 64"),
        ({"prompt": "x" * 100000}, "prompt", "prompt is longer than the model's context of 64 tokens"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_bad_options_are_refused_by_name(app, body, param, message):
    found = error(complete(app, {"prompt": "a", **body})[0])
    assert found["param"] == param
    assert message in found["message"]


def test_unknown_models_paths_methods_and_bodies(app):
    assert error(complete(app, {"model": "gpt-4"})[0], 404)["code"] == "model_not_found"
    assert error(complete(app, {"model": ["a"]})[0], 404)["param"] == "model"
    headers = {"content-type": "application/json"}
    post = [
        ask(app, ("POST", "/v1/completions", {"content": content, "headers": headers}))[0]
        for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"n": NaN}', b"[" * 200 + b"]" * 200)
    ]
    assert [error(response)["message"].startswith("the body ") for response in post] == [True] * len(post)
    get, missing, deleted = ask(app, ("GET", "/v1/completions", {}), ("GET", "/v1/x", {}), ("DELETE", "/health", {}))
    assert [error(get, 405)["type"], error(missing, 404)["type"], error(deleted, 405)["type"]] == [
        "invalid_request_error"
    ] * 3


def test_a_stop_text_ends_the_completion_before_it(app):
    prompt, n_new, seed = list(b"Hello"), 40, 4
    [ids] = generated([prompt], n_new, seed=seed)
    text = text_of(ids)
    stops = [text[10:13], text[20:22]]
    whole = {"prompt": prompt, "max_tokens": n_new, "seed": seed, "stop": stops, "logprobs": 0}
    first, streamed, other = complete(app, whole, whole | {"stream": True}, whole | {"stop": "not in the text"})
    [choice] = answer(first)["choices"]
    assert choice["text"] == text[: text.index(stops[0])]
    assert choice["finish_reason"] == "stop"
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    parts = [event["choices"][0] for event in events(streamed)]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert [token for part in parts for token in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
    assert parts[-1]["finish_reason"] == "stop"
    assert texts(other) == [text]


def test_the_end_of_text_token_ends_the_completion(app):
    backend, model = tiny_model("torch")
    rows = backend.generate(model, [[97]] * 400, 6, eos_id=EOS, per_prompt=[{"seed": s, "row": 0} for s in range(400)])
    seeds = [seed for seed, row in enumerate(rows) if len(row) > 2 and row[-1] == EOS]
    assert seeds, "no seed of 400 generates it"
    [ids] = generated([[97]], 6, seed=seeds[0])
    [response] = complete(app, {"prompt": "a", "max_tokens": 6, "seed": seeds[0], "logprobs": 1})
    [choice] = answer(response)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text_of(ids), "stop")
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>"


def test_log_probabilities_of_new_tokens_and_of_the_prompt(app, name):
    backend, model = tiny_model("torch")
    prompt, n_new, n_top = list(b"Hello"), 12, 3
    body = {"model": name, "prompt": prompt, "max_tokens": n_new, "seed": 2, "logprobs": n_top, "echo": True}
    [choice] = answer(complete(app, body)[0])["choices"]
    [ids] = generated([prompt], n_new, seed=2)
    whole = [*prompt, *ids]
    logprobs = choice["logprobs"]
    assert choice["text"] == "Hello" + text_of(ids)
    assert logprobs["tokens"] == [chr(id) if id < 128 else f"bytes:\\x{id:02x}" for id in whole]
    assert [choice["text"][offset] for offset in logprobs["text_offset"][:5]] == list("Hello")
    scored = backend.token_logprobs(model, np.array([whole]), top=n_top)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    np.testing.assert_allclose(logprobs["token_logprobs"][1:], scored.logprobs[0].numpy(), atol=1e-5)
    for entries, top in zip(logprobs["top_logprobs"][1:], scored.top_logprobs[0].tolist(), strict=True):
        np.testing.assert_allclose(sorted(entries.values(), reverse=True)[:n_top], top, atol=1e-5)
    for value, entries in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert value in entries.values()


def test_echo_alone_scores_the_prompt(app, name):
    body = {"model": name, "prompt": ["Hello", "a"], "max_tokens": 0, "echo": True, "logprobs": 0}
    found = answer(complete(app, body)[0])
    first, second = found["choices"]
    assert (first["text"], second["text"]) == ("Hello", "a")
    assert (len(first["logprobs"]["token_logprobs"]), second["logprobs"]["token_logprobs"]) == (5, [None])
    assert found["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}


def test_a_stream_has_whole_characters_and_the_whole_answer(app, name):
    body = {"model": name, "prompt": ["Hello", "é"], "n": 2, "max_tokens": 15, "seed": 9, "logprobs": 2, "echo": True}
    whole, streamed = complete(app, body, body | {"stream": True, "stream_options": {"include_usage": True}})
    *parts, last = events(streamed)
    expected = answer(whole)
    assert (last["choices"], last["usage"]) == ([], expected["usage"])
    assert {part["object"] for part in parts} == {"text_completion"}
    assert {(part["id"], part["model"]) for part in parts} == {(parts[0]["id"], name)}
    for choice in expected["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        for key, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][key]] == values


def test_a_character_of_several_tokens_arrives_whole(engines):
    engine = engines["tiny-torch"]
    emoji = list("a\N{ROCKET}b\N{ROCKET}".encode())[:-1]

    async def progress():
        row = WaitingRow(Generation([Row([1], len(emoji))], 0, lambda _: None), 0, engine.tokenizer)
        return [row.add([id], [0.0], [()]) for id in emoji]

    texts = [event.text if event else None for event in asyncio.run(progress())]
    assert texts == ["a", None, None, None, "\N{ROCKET}", "b", None, None, "\N{REPLACEMENT CHARACTER}"]


def test_beyond_the_queue_the_answer_is_429(app, engines):
    bodies = [{"model": "tiny-torch", "prompt": "a", "n": 12, "max_tokens": 40, "seed": seed} for seed in range(4)]
    engine = engines["tiny-torch"]
    release = threading.Event()

    async def requests():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
            holding = asyncio.create_task(engine.call(release.wait, 60))  # the engine runs it before all rows
            running = {asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies}
            refused = set()
            while len(refused) < 2:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                refused |= done
            release.set()
            assert await holding
            return [task.result() for task in refused], [await task for task in running]

    refused, answered = asyncio.run(requests())
    assert [len(texts(response)) for response in answered] == [12, 12]
    for response in refused:
        assert error(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
    assert engine.n_waiting == 0
    assert len(texts(complete(app, bodies[0])[0])) == 12


def test_models_and_health(app):
    models, health = ask(app, ("GET", "/v1/models", {}), ("GET", "/health", {}))
    assert [model["id"] for model in answer(models)["data"]] == ["tiny-torch", "tiny-jax"]
    assert answer(health)["status"] == "ok"
    with engines_of("torch") as own:
        closing = make_app(own, Options())
        own["tiny-torch"].close()
        [health] = ask(closing, ("GET", "/health", {}))
        assert (health.status_code, health.json()["status"]) == (503, "unavailable")
        assert error(complete(closing, {"prompt": "a"})[0], 503)["message"] == "the server is shutting down"


def test_a_failure_of_the_engine_is_an_error_of_ours(monkeypatch):
    with engines_of("torch") as engines:
        engine, app = engines["tiny-torch"], make_app(engines, Options())
        with monkeypatch.context() as patch:
            patch.setattr(engine.serving, "decode", lambda *_: iter(1 / 0 for _ in "a"))
            whole, streamed = complete(app, {"prompt": "a"}, {"prompt": "a", "stream": True})
        assert error(whole, 500)["message"] == "the server failed: ZeroDivisionError; its terminal has the details"
        assert whole.headers.items() >= {name.lower(): value for name, value in HEADERS.items()}.items()
        assert '"error": {"message": "the server failed: ZeroDivisionError"' in streamed.text
        with monkeypatch.context() as patch:
            patch.setattr(engine.serving, "decode", lambda *_: check_finite(3))
            [damaged] = complete(app, {"prompt": "a"})
        assert error(damaged, 500)["message"].startswith("the model's logits are not finite at new token 3")
        assert texts(complete(app, {"prompt": "a", "max_tokens": 2, "seed": 1})[0]) == [
            text_of(generated([[97]], 2, seed=1)[0])
        ]


@pytest.fixture(scope="module")
def chat_app():
    with engines_of("torch", template="alpaca") as engines:
        yield make_app(engines, Options())


def chat(app, *bodies):
    return complete(app, *bodies, path="/v1/chat/completions")


def test_chat_completions_follow_the_template(monkeypatch):
    wide = dataclasses.replace(CONFIG, n_ctx=256)
    monkeypatch.setattr(served, "CONFIG", wide)
    served.tiny_model.cache_clear()
    try:
        backend, model = served.tiny_model("torch")
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Say a."},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "b."}]},
        ]
        turns = Conversation((Turn("Say a.", "", "a"), Turn("Say b.", "", "")), "Be brief.", "")
        first, second = render(turns, "alpaca")
        prompt = [*(first.prompt + first.response).encode(), EOS, *second.prompt.encode()]
        rows = backend.generate(model, [prompt], 10, samples=2, seed=6, eos_id=EOS)
        expected = [text_of([id for id in row[len(prompt) :] if id != EOS]) for row in rows]
        with engines_of("torch", template="alpaca") as engines:
            app = make_app(engines, Options())
            body = {"messages": messages, "max_tokens": 10, "n": 2, "seed": 6, "logprobs": True, "top_logprobs": 2}
            whole, streamed = chat(app, body, body | {"stream": True})
            found = answer(whole)
            assert found["object"] == "chat.completion"
            assert [choice["message"]["content"] for choice in found["choices"]] == expected
            content = found["choices"][0]["logprobs"]["content"]
            assert bytes(byte for token in content for byte in token["bytes"]).decode(errors="replace") == expected[0]
            assert {len(token["top_logprobs"]) for token in content} == {2}
            parts = [part["choices"][0] for part in events(streamed)]
            assert [part["delta"] for part in parts[:2]] == [{"role": "assistant", "content": ""}] * 2
            for index in range(2):
                own = [part["delta"].get("content", "") for part in parts if part["index"] == index]
                assert "".join(own) == expected[index]
    finally:
        served.tiny_model.cache_clear()


def test_chat_is_refused_where_it_makes_no_sense(app, chat_app):
    user = {"role": "user", "content": "a"}
    refused = error(chat(app, {"messages": [user]})[0])
    assert "was not tuned on instructions" in refused["message"]
    cases = {
        "messages must be a list of messages that is not empty": None,
        "message 1 must be an object": ["a"],
        "message 1: this server has no 'tool_calls'": [user | {"tool_calls": []}],
        "message 1: content must be a text": [user | {"content": [{"type": "image_url"}]}],
        "the last message must be from the user": [user, {"role": "assistant", "content": "b"}],
        "where the user has to speak": [{"role": "tool", "content": "b"}, user],
        "messages, message 1 is empty": [user | {"content": " "}],
        "messages have ": [user | {"content": "x" * 60}],
        "messages are longer": [user | {"content": "x" * 60000}],
    }
    for message, messages in cases.items():
        assert message in error(chat(chat_app, {"messages": messages})[0])["message"]
    both = {"messages": [user], "max_tokens": 1, "max_completion_tokens": 1}
    assert "top_logprobs needs logprobs" in error(chat(chat_app, {"messages": [user], "top_logprobs": 1})[0])["message"]
    assert error(chat(chat_app, {"messages": [user], "tools": [{}]})[0])["param"] == "tools"
    assert error(chat(chat_app, both)[0])


def test_a_chat_needs_a_token_and_rows_that_fit_into_the_queue():
    body = {"messages": [{"role": "user", "content": "a"}]}
    with engines_of("torch", template="plain") as engines:
        app = make_app(engines, Options())
        for options, param in (
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_completion_tokens": 0}, "max_completion_tokens"),
            ({"n": 25}, "n"),
        ):
            assert error(chat(app, body | options)[0])["param"] == param
        assert answer(chat(app, body | {"n": 24, "max_tokens": 1})[0])["usage"]["completion_tokens"] == 24


def test_the_template_is_that_of_the_run_which_tuned_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(served_chat, "chat_template", lambda run: run.name)
    plain, base, tuned = (tmp_path / name / "checkpoints" / "000001" for name in ("plain", "base", "tuned"))
    for weights in (plain, base, tuned):
        weights.mkdir(parents=True)
    for weights in (base, tuned):
        (weights.parents[1] / "config.json").write_text("{}")
    assert served_chat.served_template(plain, None) is None
    assert served_chat.served_template(base, None) == "base"
    assert served_chat.served_template(plain, tuned) == "tuned"
    assert served_chat.served_template(base, tuned) == "tuned"
    assert served_chat.served_template(base, plain) == "base"


def test_a_client_that_leaves_frees_its_place(engines):
    """The request is cancelled while it decodes and while it waits; then nothing is left in the engine."""
    engine, app = engines["tiny-torch"], make_app(engines, Options())

    async def leave():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = {"model": "tiny-torch", "prompt": "a", "n": 12, "max_tokens": 60}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
            while not engine.n_running or not engine.n_waiting:
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (engine.n_running, engine.n_waiting) == (0, 0)

    asyncio.run(leave())
