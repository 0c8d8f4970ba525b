"""Downloads from a local server that misbehaves on purpose."""

import contextlib
import hashlib
import http.server
import multiprocessing
import threading

import pytest

from parity.errors import InputError
from parity.storage import download
from parity.storage.download import RemoteFile, fetch
from parity.weights import openai_files
from parity.weights.openai_files import model_files

CONTENT = bytes(range(256)) * 5000  # 1.28 MB, many chunks
REMOTE_FILE = RemoteFile("file", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
TAG = '"one"'


class Server:
    """Answers each request with the next behaviour in `script`, and repeats the last one."""

    def __init__(self):
        self.script, self.requests = ["good"], []
        self.closing = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                behaviour = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                outer.requests.append((self.path, dict(self.headers)))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    outer.answer(self, behaviour)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, handler, behaviour):
        if isinstance(behaviour, int):
            handler.send_response(behaviour)
            handler.send_header("Retry-After", "0")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body, begin = {"html": b"<html>sign in</html>", "other": CONTENT[::-1]}.get(behaviour, CONTENT), 0
        asked = handler.headers.get("Range")
        if asked and behaviour != "no range" and handler.headers.get("If-Range") == TAG:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        else:
            handler.send_response(200)
        if not behaviour.startswith("no tag"):
            handler.send_header("ETag", TAG)
        if behaviour != "no length":
            handler.send_header("Content-Length", str(len(body) - begin))
        handler.end_headers()
        if behaviour in ("close", "stall", "no tag, close"):
            handler.wfile.write(body[begin : begin + 600_000])
            handler.wfile.flush()
            if behaviour == "stall":
                self.closing.wait()
            return
        handler.wfile.write(body[begin:])

    def close(self):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_LONGEST_WAIT", 0.01)
    server = Server()
    yield server
    server.close()


def get(server, tmp_path, remote=REMOTE_FILE, addresses=None, **options):
    # Only a server that sends nothing makes a test wait for the timeout; it must not pass on a busy machine otherwise.
    seconds = 2 if "stall" in server.script else 60
    options = {"timeout": (60, seconds), "tries": 3, **options}
    return fetch(remote, tmp_path / "file", addresses or [f"{server.url}/file"], **options)


@pytest.mark.parametrize(
    ("script", "requests"),
    [
        (["good"], 1),
        (["no length"], 1),
        (["close", "good"], 2),
        (["close", "no range"], 2),
        (["stall", "good"], 2),
        ([500, 503, "good"], 3),
        ([429, "good"], 2),
        (["close", 416, "good"], 3),
        (["close", "close", "good"], 3),
    ],
    ids=str,
)
def test_download_retries(server, tmp_path, script, requests):
    server.script = script
    seen = []
    assert get(server, tmp_path, on_progress=seen.append).read_bytes() == CONTENT
    assert len(server.requests) == requests
    assert seen[-1] == len(CONTENT)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "file.lock"}


def test_resumes_where_it_stopped_and_only_the_same_file(server, tmp_path):
    server.script = ["close", "good"]
    get(server, tmp_path)
    headers = server.requests[1][1]
    begin = int(headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 500_000 < begin <= 600_000
    assert headers["If-Range"] == TAG


def test_a_part_of_another_file_is_not_continued(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.etag").write_text('"two"')
    assert get(server, tmp_path).read_bytes() == CONTENT
    (tmp_path / "file").unlink()
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.etag").write_text(TAG)  # same tag, wrong bytes: only the sha256 shows it
    with pytest.raises(InputError, match="sha256"):
        get(server, tmp_path)
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([404], "responds with status 404"),
        ([403], "responds with status 403"),
        ([500], r"responds with status 500 \(3 tries\)"),
        (["html"], "offers 20 bytes"),
        (["other"], "sha256"),
        (["no tag, close"], r"\(3 tries\)"),
    ],
    ids=str,
)
def test_one_clear_error_and_nothing_under_the_name(server, tmp_path, script, message):
    server.script = script
    with pytest.raises(InputError, match=message) as caught:
        get(server, tmp_path)
    assert f"{server.url}/file" in str(caught.value)
    assert not (tmp_path / "file").exists()
    assert len(server.requests) == (1 if script in ([404], [403], ["html"], ["other"]) else 3)


def test_mirrors_in_order(server, tmp_path):
    server.script = [404, "good"]
    addresses = ["http://127.0.0.1:9/file", f"{server.url}/a", f"{server.url}/b"]
    assert get(server, tmp_path, addresses=addresses).read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/a", "/b"]


def test_offline_opens_no_socket(server, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    with pytest.raises(InputError, match="downloads are forbidden"):
        get(server, tmp_path)
    (tmp_path / "file").write_bytes(CONTENT)
    get(server, tmp_path)
    assert not server.requests


def test_full_disk(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="1,000 bytes free, but the download needs 1,280,000"):
        get(server, tmp_path)


def _get_in_child(url, folder):
    fetch(REMOTE_FILE, folder / "file", [f"{url}/file"])


def test_two_processes_fetch_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_get_in_child, args=(server.url, tmp_path)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_the_seven_files():
    files = {remote.name: remote for remote in model_files("124M")}
    assert len(files) == 7
    assert files["model.ckpt.data-00000-of-00001"].size == 497_759_232
    assert all(remote.sha256 and remote.size for remote in files.values())
    assert {w.name: w.size for w in model_files("1558M")}["model.ckpt.data-00000-of-00001"] == 6_230_444_800
    with pytest.raises(InputError, match="unknown model"):
        model_files("117M")


def test_a_whole_model_from_a_base_url(server, tmp_path, monkeypatch):
    files = [RemoteFile(f"part{n}", REMOTE_FILE.size, REMOTE_FILE.sha256) for n in range(3)]
    monkeypatch.setattr(openai_files, "model_files", lambda size: files)
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path))
    folder = openai_files.download_model("124M", base_urls=[f"{server.url}/models/"])
    assert folder == tmp_path / "models" / "124M"
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".lock") == ["part0", "part1", "part2"]
    assert [path for path, _ in server.requests] == [f"/models/124M/part{n}" for n in range(3)]
