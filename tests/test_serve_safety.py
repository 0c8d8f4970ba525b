"""What the server refuses: other hosts and sites, wrong keys, large bodies, slow and half-open connections; its end."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest
from support.runs import command, run_script
from support.served import ask, engines_of, serving

from parity.serving import security, server
from parity.serving.app import Options, make_app

JSON = {"content-type": "application/json"}
BODY = json.dumps({"prompt": "a", "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def engines():
    with engines_of("torch") as engines:
        yield engines


@pytest.fixture(scope="module")
def app(engines):
    return make_app(engines, Options(hosts=["my-machine"], largest_body=5000))


def statuses(app, requests):
    return [response.status_code for response in ask(app, *requests)]


def test_only_this_servers_names_are_answered(app):
    """A page of another site whose name resolves to 127.0.0.1 sends its own name."""
    own = [
        "127.0.0.1:8000",
        "localhost",
        "LOCALHOST:1",
        "[::1]:80",
        "[::1]",
        "192.168.1.7",
        "my-machine:5",
        "My-Machine",
    ]
    others = [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "localhost:x",
    ]
    others += ["localhost:80:80", "my-machine.", "[evil]", "a@localhost", "127.0.0.1/evil"]
    for path in ("/health", "/", "/v1/models", "/static/x"):
        requests = [("GET", path, {"headers": {"host": host}}) for host in own + others]
        found = statuses(app, requests)
        assert 403 not in found[: len(own)], path
        assert found[len(own) :] == [403] * len(others), path
    twice = httpx.Headers([("host", "localhost"), ("host", "evil.example")])
    assert statuses(app, [("GET", "/health", {"headers": twice})]) == [403]


def test_pages_of_other_sites_are_refused(app):
    post = {"content": BODY}
    for origin, status in [
        ("http://127.0.0.1:8000", 200),
        ("http://127.0.0.1:8001", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
    ]:
        requests = [("POST", "/v1/completions", {**post, "headers": {**JSON, "origin": origin}})]
        assert statuses(app, requests) == [status], origin
    # What a page may send to another site without asking it first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"):
        assert statuses(app, [("POST", "/v1/completions", {**post, "headers": {"content-type": kind}})]) == [415], kind
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    [response] = ask(app, ("OPTIONS", "/v1/completions", {"headers": preflight}))
    assert response.status_code == 403
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_every_response_has_the_headers_of_a_page_that_loads_nothing_from_elsewhere(app):
    for response in ask(
        app,
        ("GET", "/health", {}),
        ("GET", "/nothing", {}),
        ("GET", "/health", {"headers": {"host": "evil.example"}}),
        ("POST", "/v1/completions", {"headers": JSON, "content": b"{"}),
        ("POST", "/v1/completions", {"headers": JSON, "content": BODY}),
    ):
        for name, value in security.HEADERS.items():
            assert response.headers[name] == value
        assert response.headers["content-security-policy"].startswith("default-src 'self';")


def test_with_a_key_only_the_page_and_health_are_open(engines):
    app = make_app(engines, Options(api_key="clé"))
    keys = [{}, {"authorization": "Bearer wrong"}, {"authorization": "clé"}, {"authorization": "Basic clé"},
            {"authorization": "Bearer "}, {"authorization": "Bearer cl"}]  # fmt: skip
    closed = [("GET", path) for path in ("/v1/models", "/nothing", "/static", "/health/", "/staticx/", "/v1?/static/")]
    closed.append(("POST", "/v1/completions"))
    for key in keys:
        headers = {name: value.encode() for name, value in key.items()}
        requests = [(method, path, {"headers": {**JSON, **headers}, "content": BODY}) for method, path in closed]
        assert statuses(app, requests) == [401] * len(closed), key
    right = {"authorization": "bearer clé".encode()}
    assert statuses(app, [("GET", "/v1/models", {"headers": right}), ("GET", "/health", {})]) == [200, 200]
    assert statuses(app, [("POST", "/v1/completions", {"headers": {**JSON, **right}, "content": BODY})]) == [200]


def test_large_bodies_are_refused(app):
    large = json.dumps({"prompt": "a" * 5000}).encode()

    async def chunks():
        for _ in range(100):
            yield b" " * 100

    assert statuses(app, [("POST", "/v1/completions", {"headers": JSON, "content": large})]) == [413]
    assert statuses(app, [("POST", "/v1/completions", {"headers": JSON, "content": chunks()})]) == [413]
    length = {**JSON, "content-length": "9" * 30}
    assert statuses(app, [("POST", "/v1/completions", {"headers": length, "content": b"{}"})]) == [413]


@contextlib.contextmanager
def connection(address, data=b""):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connected:
        connected.sendall(data)
        yield connected


def read_all(connected):
    """What arrives until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connected.recv(65536):
            data += part
    return data


def request(body=BODY, length=None, path="/v1/completions"):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@pytest.fixture
def impatient(monkeypatch):
    """A server with short limits."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(server, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 0.2)
    monkeypatch.setattr(security, "BODY_SECONDS", 0.2)
    with engines_of("torch") as engines, serving(engines) as address:
        yield address


def test_slow_and_half_open_connections_are_closed(impatient):
    for beginning in (b"", b"G", b"GET /health HTTP/1.1\r\nHost: loc", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"):
        with connection(impatient, beginning) as connected:
            assert read_all(connected) == b"", beginning
    with connection(impatient, request(length=len(BODY) + 5)) as connected:
        answer = read_all(connected)
        assert answer.startswith(b"HTTP/1.1 408 "), answer
    # The second request of a connection, too.
    with connection(impatient, request() + b"GET /health HTTP/1.1\r\nHo") as connected:
        answer = read_all(connected)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1
    assert httpx.get(f"{impatient}/health").status_code == 200


def test_damaged_requests_are_refused(impatient):
    for data in (
        b"\x16\x03\x01\x02\x00",  # TLS
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ):
        with connection(impatient, data) as connected:
            answer = read_all(connected)
        assert re.match(rb"HTTP/1.1 4\d\d |$", answer), answer
    assert httpx.get(f"{impatient}/health").json()["status"] == "ok"


def test_a_client_that_reads_nothing_is_disconnected(monkeypatch):
    """So that its answer does not stay in memory; what it has of it ends in the middle."""
    monkeypatch.setattr(server, "STALL_SECONDS", 0.2)

    with engines_of("torch") as engines:
        app = make_app(engines, Options())

        async def huge(scope, receive, send):
            if scope["type"] != "http" or scope["path"] != "/huge":
                await app(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            with contextlib.suppress(Exception):
                for _ in range(1000):
                    await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
            ended.set()

        ended, ready, addresses = threading.Event(), threading.Event(), []
        started = server.new_server(huge, "127.0.0.1", 0, lambda address: (addresses.append(address), ready.set()))
        thread = threading.Thread(target=started.run)
        thread.start()
        assert ready.wait(60)
        with connection(addresses[0], b"GET /huge HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            assert ended.wait(60), "the response waits for a client that does not read"
        started.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def held(monkeypatch):
    """(an engine that waits before the second token of each batch, the event that it waits for)"""
    with engines_of("torch") as engines:
        engine = engines["tiny-torch"]
        go, decode = threading.Event(), engine.serving.decode

        def waiting(model, request):
            for chunk in decode(model, request):
                yield chunk
                assert go.wait(60)

        monkeypatch.setattr(engine.serving, "decode", waiting)
        yield engines, go


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_stops_its_rows(held, stream):
    engines, go = held
    engine = engines["tiny-torch"]
    body = json.dumps({"prompt": "a", "n": 6, "max_tokens": 60, "stream": stream}).encode()
    with serving(engines) as address:
        with connection(address, request(body)) as connected:
            wait_until(lambda: engine.n_running == 4 and engine.n_waiting == 2)
            if stream:
                assert connected.recv(1)
        wait_until(lambda: engine.n_running == engine.n_waiting == 0)  # while the batch is held
        go.set()


def test_the_server_ends_its_requests_before_it_stops(held):
    engines, go = held
    engine = engines["tiny-torch"]
    answers = []

    def ask_slowly(address):
        body = {"prompt": "a", "max_tokens": 30, "temperature": 0}
        answers.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60))

    with serving(engines) as address:
        asking = threading.Thread(target=ask_slowly, args=(address,))
        asking.start()
        wait_until(lambda: engine.n_running)
        threading.Timer(0.3, go.set).start()
    asking.join(60)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 30
    assert not engine.is_ready


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose name is hostile to a page, a terminal and an address."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>\"'& \x1b[31m\n%2e"
    (folder.parent / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    options = ["--preset", "tiny", "--steps", 2, "--corpus", folder.parent / "corpus.txt"]
    result = run_script("train_torch.py", *options, "--run", folder)
    assert result.returncode == 0, result.stderr
    return folder


def start(*arguments):
    process = subprocess.Popen(
        command("serve.py", "--port", 0, "--backend", "torch", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    found = re.search(r"serving (.*) at (http://\S+)", line)
    if not found:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    return process, found[1], found[2]


def test_the_script_serves_a_run_with_a_hostile_name_until_sigterm(run_folder):
    process, _, address = start("--run", run_folder)
    try:
        models = httpx.get(f"{address}/v1/models").json()["data"]
        assert [model["id"] for model in models] == [f"{run_folder.name}-torch"]
        found = httpx.post(f"{address}/v1/completions", json={"model": models[0]["id"], "max_tokens": 3, "seed": 1})
        assert (found.status_code, found.json()["model"]) == (200, f"{run_folder.name}-torch")
        refused = httpx.post(f"{address}/v1/completions", json={"model": "<b>\x1b"})
        assert refused.headers["content-type"] == "application/json"
        page = httpx.get(f"{address}/")
        assert "<img src=x" not in page.text
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "\x1b" not in err
    assert "Traceback" not in err


def test_the_script_refuses_what_it_cannot_serve(run_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_script("serve.py", "--run", run_folder, "--backend", "torch", "--port", port)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2,
        f"error: --host 127.0.0.1 --port {port}: Address already in use; give another one",
    )
    for arguments, message in [
        (["--run", "nowhere"], "nowhere"),
        ([], "give either a run folder"),
        (["--run", run_folder, "--max-batch", 0], "--max-batch and --max-waiting must be at least 1"),
        (["--run", run_folder, "--host", "no.such.name.invalid", "--port", 0], "--host no.such.name.invalid"),
    ]:
        result = run_script("serve.py", "--backend", "torch", *arguments)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr.splitlines()[-1]
