"""What the server refuses: other hosts and sites, wrong keys, large bodies, slow and half-open connections; its end."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
from types import SimpleNamespace

import httpx
import pytest
from support.runs import command, run_script
from support.served import ask, engines_of, serving, wait_until

from parity.errors import InputError
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
def address(monkeypatch):
    """Of a server without limits of time; a test sets the one that it reaches, so that no other one can be first."""
    for module, name in LIMITS:
        monkeypatch.setattr(module, name, 1000)
    with engines_of("torch") as engines, serving(engines) as address:
        yield address


LIMITS = [
    (server, "HEADER_SECONDS"),
    (server, "STALL_SECONDS"),
    (server, "KEEP_ALIVE_SECONDS"),
    (security, "BODY_SECONDS"),
]


def test_connections_without_a_whole_header_are_closed(address, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    for beginning in (b"", b"G", b"GET /health HTTP/1.1\r\nHost: loc", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"):
        with connection(address, beginning) as connected:
            assert read_all(connected) == b"", beginning


def test_the_second_header_of_a_connection_has_a_limit_too(address, monkeypatch):
    with connection(address, request()) as connected:
        answer = connected.recv(65536)
        while not answer.endswith(b"}"):
            answer += connected.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
        connected.sendall(b"GET /health HTTP/1.1\r\nHo")
        assert read_all(connected) == b""


def test_slow_bodies_are_refused(address, monkeypatch):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.2)
    with connection(address, request(length=len(BODY) + 5)) as connected:
        answer = read_all(connected)
        assert answer.startswith(b"HTTP/1.1 408 "), answer


def test_a_connection_without_a_whole_further_request_is_closed(monkeypatch):
    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 0.2)
    with engines_of("torch") as engines, serving(engines) as address:
        for beginning in (b"", b"GET /health HTTP/1.1\r\nHo"):
            with connection(address, request() + beginning) as connected:
                answer = read_all(connected)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"HTTP/1.1") == 1


def test_damaged_requests_are_refused(address):
    for data in (
        b"\x16\x03\x01\x02\x00",  # TLS
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ):
        with connection(address, data) as connected:
            connected.shutdown(socket.SHUT_WR)
            answer = read_all(connected)
        assert re.match(rb"HTTP/1.1 4\d\d |$", answer), answer
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


@contextlib.contextmanager
def app_on_a_thread(app):
    """The address of a server of an ASGI application; at the end the server must stop by itself."""
    ready, addresses = threading.Event(), []
    started = server.new_server(
        app, server.bind("127.0.0.1", 0), lambda address: (addresses.append(address), ready.set())
    )
    thread = threading.Thread(target=started.run)
    thread.start()
    assert ready.wait(60)
    try:
        yield addresses[0]
    finally:
        started.should_exit = True
        thread.join(60)
    assert not thread.is_alive(), "the server waits for a client"


def sends(size, count, ended):
    """An application that answers with `count` parts of `size` bytes."""

    async def app(scope, receive, send):
        if scope["type"] != "http":
            await receive(), await send({"type": "lifespan.startup.complete"})
            await receive(), await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with contextlib.suppress(Exception):
            for _ in range(count):
                await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
        ended.set()

    return app


def test_a_client_that_reads_nothing_is_disconnected(monkeypatch):
    """So that its answer does not stay in memory; what it has of it ends in the middle."""
    monkeypatch.setattr(server, "STALL_SECONDS", 0.2)
    ended = threading.Event()
    with (
        app_on_a_thread(sends(2**20, 1000, ended)) as address,
        connection(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ):
        assert ended.wait(60), "the response waits for a client that does not read"


@pytest.fixture
def transports(monkeypatch):
    """The transports of the server's connections, whose buffers in the kernel are small."""
    transports, made = [], server.Protocol.connection_made

    def connection_made(protocol, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transports.append(transport)
        made(protocol, transport)

    monkeypatch.setattr(server.Protocol, "connection_made", connection_made)
    return transports


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@contextlib.contextmanager
def narrow_connection(address):
    with socket.socket() as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.removeprefix("http://").split(":")
        connected.settimeout(60)
        connected.connect((host, int(port)))
        connected.sendall(GET)
        yield connected


def test_a_client_that_leaves_the_end_of_its_response_does_not_keep_the_server(transports, monkeypatch):
    """Less than 64 KiB remain, with which asyncio does not call a transport full by itself."""
    monkeypatch.setattr(server, "STALL_SECONDS", 0.2)
    ended = threading.Event()
    with app_on_a_thread(sends(60_000, 1, ended)) as address, narrow_connection(address):
        assert ended.wait(60)
        assert 0 < transports[0].get_write_buffer_size() < 2**16
        wait_until(lambda: transports[0].is_closing() and transports[0].get_write_buffer_size() == 0)


def test_a_client_that_reads_slowly_is_not_disconnected():
    timers, aborted, sizes = [], [], [100, 60, 60, 60]
    protocol = object.__new__(server.Protocol)
    protocol.loop = SimpleNamespace(call_later=lambda _, *call: (timers.append(call), SimpleNamespace(cancel=int))[1])
    protocol.transport = SimpleNamespace(
        get_write_buffer_size=lambda: sizes.pop(0), abort=lambda: aborted.append(len(timers))
    )
    protocol._watch()  # 100 bytes remain, and then 60, whose rest the client does not read
    for function, *arguments in timers:
        function(*arguments)
    assert aborted == [2]


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

    def release_when_closed(address):
        def is_closed():
            try:
                with connection(address):
                    return False
            except OSError:
                return True

        wait_until(is_closed)
        go.set()

    with serving(engines) as address:
        asking = threading.Thread(target=ask_slowly, args=(address,))
        asking.start()
        wait_until(lambda: engine.n_running)
        releasing = threading.Thread(target=release_when_closed, args=(address,))
        releasing.start()
    asking.join(60)
    releasing.join(60)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 30
    assert not engine.is_ready


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A link to a run whose name is hostile to a page, a terminal and an address, and not in UTF-8."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>\"'& \x1b[31m\n%2e"
    (folder.parent / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    options = ["--preset", "tiny", "--steps", 2, "--corpus", folder.parent / "corpus.txt"]
    result = run_script("train_torch.py", *options, "--run", folder)
    assert result.returncode == 0, result.stderr
    link = folder.parent / "link"
    link.symlink_to(folder.rename(f"{folder}\udcff"))
    return link


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
        name = f"{run_folder.resolve().name[:-1]}\\udcff-torch"
        assert [model["id"] for model in models] == [name]
        assert httpx.get(f"{address}/health").json()["models"].keys() == {name}
        found = httpx.post(f"{address}/v1/completions", json={"model": models[0]["id"], "max_tokens": 3, "seed": 1})
        assert (found.status_code, found.json()["model"]) == (200, name)
        refused = httpx.post(f"{address}/v1/completions", json={"model": "<b>\x1b"})
        assert refused.headers["content-type"] == "application/json"
        assert httpx.get(f"{address}/page/info").json()["source"] == name.removesuffix("-torch")
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
    # Nothing was loaded before.
    assert (result.returncode, result.stderr) == (
        2,
        f"error: --host 127.0.0.1 --port {port}: Address already in use; give another one\n",
    )
    for arguments, message in [
        (["--run", "nowhere"], "nowhere"),
        ([], "give either a run folder"),
        (["--run", run_folder, "--max-batch", 0], "--max-batch must be at least 1"),
        (["--run", run_folder, "--max-waiting", 8], "--max-waiting at least --max-batch, got 16 and 8"),
    ]:
        result = run_script("serve.py", "--backend", "torch", "--port", 0, *arguments)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr.splitlines()[-1]


def test_only_ports_and_hosts_that_exist_are_bound():
    for port in (-1, 65536, 70000):
        with pytest.raises(InputError, match=rf"--port must be in 0\.\.65535, got {port}"):
            server.bind("127.0.0.1", port)
    for host in ("no.such.name.invalid", "", "a" * 70, "1.2.3.4.5"):
        with pytest.raises(InputError, match=f"--host {host} --port 0"):
            server.bind(host, 0)
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1 --port 0: "):  # of no machine
        server.bind("192.0.2.1", 0)


def test_all_addresses_of_a_name_are_bound(monkeypatch):
    [reserved] = server.bind("127.0.0.1", 0)
    port = reserved.getsockname()[1]
    hosts = ("127.0.0.2", "192.0.2.1", "127.0.0.1", "127.0.0.2")  # 192.0.2.1 is of no machine
    [other] = server.bind("127.0.0.1", port)
    other.listen()
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)) for host in hosts]
    monkeypatch.setattr(server, "_addresses", lambda *_: resolved)
    with pytest.raises(InputError, match=f"--host name --port {port}: Address already in use"):
        server.bind("name", port)
    other.close()
    both = server.bind("name", port)
    assert [listener.getsockname() for listener in both] == [("127.0.0.2", port), ("127.0.0.1", port)]
    close_all([*both, reserved])


def close_all(listeners):
    for listener in listeners:
        listener.close()


def test_a_program_that_listens_in_the_meantime_is_an_input_error():
    [own] = server.bind("127.0.0.1", 0)
    [other] = server.bind("127.0.0.1", own.getsockname()[1])
    other.listen()
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:\d+: Address already in use; give another --port"):
        server.new_server(None, [own], print)
    close_all([own, other])
