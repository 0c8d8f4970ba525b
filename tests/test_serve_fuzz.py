"""Random bodies, headers and bytes: each gets an answer of the API, and the engine goes on."""

import contextlib
import json
import random
import socket

import pytest
from support.served import ask, complete, engines_of, serving

from parity.serving.app import Options, make_app
from parity.serving.options import COMMON, LACKING

ANSWERED = {200, 400, 401, 403, 404, 405, 413, 415, 429}
BODIES = [
    {"model": "tiny-torch", "prompt": "Hello", "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 1},
    {"prompt": [[1, 2], [3]], "max_tokens": 2, "logprobs": 2, "echo": True, "stop": ["a", "bc"]},
    {"prompt": ["a", "é\N{ROCKET}"], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
    {"prompt": "a", "max_tokens": 2, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop": "x"},
]
CHATS = [
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2},
    {
        "messages": [
            {"role": "system", "content": "b"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
        "max_completion_tokens": 2,
        "stream": True,
    },
]
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 257, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.0, 0.5, 1.0, 1.5, -0.5,
    1e-300, 1e300, "", "a", "\0", "\ud800", "é\N{ROCKET}", "<|endoftext|>", "a" * 70, "1", [], [0], [1, 2],
    [257], [-1], [True], [1.0], ["a"], ["a", 1], [[]], [[1], "a"], [[[1]]], [None], {}, {"a": 1},
    {"type": "text", "text": "a"}, {"role": "user", "content": "a"}, {"include_usage": 1},
    1.7976931348623157e308, 5e-324,
]  # fmt: skip
NAMES = [
    *COMMON, *LACKING, "prompt", "logprobs", "echo", "messages", "top_logprobs", "max_completion_tokens", "",
    "\n", "x" * 300,
]  # fmt: skip
HEADERS = [
    "host", "origin", "content-type", "content-length", "authorization", "accept", "transfer-encoding",
    "expect", "connection", "x-forwarded-for", "content-encoding", "cookie", "referer", "te", "range",
    "if-none-match",
]  # fmt: skip
HEADER_VALUES = [
    "", "a", "127.0.0.1", "localhost", "evil", "[::1]", "[", "]", ":", "a:b", "application/json",
    "application/json; charset=utf-16", "text/plain", "Bearer", "Bearer key", "Bearer \xff", "chunked", "gzip",
    "-1", "0", "99999999999999", "1e3", "\xff\xfe", "a" * 3000, "null", "http://127.0.0.1:8000", "100-continue",
    "bytes=0-1", "\t", "*/*",
]  # fmt: skip


def changed(generator, value, depth=0):
    """A JSON value with one of its parts replaced, removed or added."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        result = dict(value)
        name = generator.choice(list(result))
        kind = generator.random()
        if kind < 0.2:
            del result[name]
        elif kind < 0.5:
            result[generator.choice(NAMES)] = generator.choice(VALUES)
        else:
            result[name] = changed(generator, result[name], depth + 1)
        return result
    if isinstance(value, list) and value and generator.random() < 0.5:
        place = generator.randrange(len(value))
        return [*value[:place], changed(generator, value[place], depth + 1), *value[place + 1 :]]
    return generator.choice(VALUES)


def random_body(generator, valid):
    body = valid
    for _ in range(generator.randint(1, 3)):
        body = changed(generator, body)
    if isinstance(body, dict) and isinstance(body.get("messages"), list) and generator.random() < 0.1:
        body["messages"] = body["messages"] * 50
    data = json.dumps(body, ensure_ascii=generator.random() < 0.5).encode("utf-8", "surrogatepass")
    if generator.random() < 0.3:  # damaged bytes
        place = generator.randrange(len(data) + 1)
        noise = bytes(generator.randrange(256) for _ in range(generator.randint(0, 4)))
        data = data[:place] + noise + data[place + generator.randint(0, 3) :]
    if generator.random() < 0.02:
        data = generator.choice(
            [b"", b"[" * 50000, b'{"a":' * 50000, b'{"n":' + b"9" * 5000 + b"}", b"NaN", b"\xef\xbb\xbf{}"]
        )
    return data


def random_headers(generator):
    headers = {"content-type": "application/json"}
    if generator.random() < 0.3:
        name = generator.choice([*HEADERS, "x-" + "a" * generator.randint(1, 50)])
        headers[name] = generator.choice(HEADER_VALUES)
    return {name: value.encode("latin-1") for name, value in headers.items()}


def random_requests(generator, count):
    for _ in range(count):
        kind = generator.random()
        path, valid = ("/v1/completions", BODIES) if kind < 0.7 else ("/v1/chat/completions", CHATS)
        method = "POST"
        if kind > 0.97:
            method, path = generator.choice(["GET", "PUT", "OPTIONS", "HEAD", "TRACE", "X"]), generator.choice(PATHS)
        body = random_body(generator, generator.choice(valid))
        yield method, path, {"content": body, "headers": random_headers(generator)}


PATHS = [
    "/", "//", "/health", "/v1", "/v1/models", "/v1/completions", "/v1/%00", "/%2e%2e/", "/static/../x", "/é",
    "/v1/models/a",
]  # fmt: skip


@pytest.mark.parametrize("count", [500, pytest.param(6000, marks=pytest.mark.slow)])
def test_random_requests_get_an_answer_of_the_api(count):
    generator = random.Random(count)
    with engines_of("torch", template="plain", max_waiting=24) as engines:
        app = make_app(engines, Options(largest_body=20000))
        alone = complete(app, BODIES[0])[0].json()["choices"]
        seen = {}
        for _ in range(count // 10):
            requests = list(random_requests(generator, 10))
            for request, response in zip(requests, ask(app, *requests), strict=True):
                assert response.status_code in ANSWERED, (request, response.text)
                seen[response.status_code] = seen.get(response.status_code, 0) + 1
                is_of_api = request[1].startswith("/v1")
                if response.status_code == 200 or request[0] == "HEAD" or not is_of_api:
                    continue
                error = response.json()["error"]
                assert error["message"].isprintable(), error
                assert len(error["message"]) <= 2500
        assert len(seen) >= 6, seen
        assert seen[200] >= count / 20, seen
        assert complete(app, BODIES[0])[0].json()["choices"] == alone
        engine = engines["tiny-torch"]
        assert (engine.n_running, engine.n_waiting) == (0, 0)


@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_random_bytes_on_a_connection(count):
    """What uvicorn parses: each connection ends with an answer or is closed, and the next one is served."""
    generator = random.Random(count)
    with engines_of("torch") as engines, serving(engines) as address:
        host, port = address.removeprefix("http://").split(":")
        for _ in range(count):
            body = random_body(generator, generator.choice(BODIES))
            lines = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json"]
            lines += [b"Connection: close", b"Content-Length: %d" % len(body)]
            lines += [name.encode() + b": " + value for name, value in random_headers(generator).items()][1:]
            data = b"\r\n".join([*lines, b"", body])
            for _ in range(generator.randint(0, 2)):
                place = generator.randrange(len(data))
                data = data[:place] + bytes([generator.randrange(256)]) + data[place + generator.randint(0, 2) :]
            answer = b""
            with socket.create_connection((host, int(port)), timeout=60) as connected, contextlib.suppress(OSError):
                connected.sendall(data)
                connected.shutdown(socket.SHUT_WR)
                while part := connected.recv(65536):
                    answer += part
            if answer:
                version, status = answer.split(b" ", 2)[:2]
                assert version == b"HTTP/1.1"
                assert int(status) in ANSWERED | {100, 408}, (data, answer)
        assert complete(make_app(engines, Options()), BODIES[0])[0].status_code == 200
