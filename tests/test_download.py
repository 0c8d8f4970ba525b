"""Downloads from a local server that misbehaves on purpose."""

import contextlib
import hashlib
import http.server
import json
import multiprocessing
import os
import threading

import numpy as np
import pytest
from support.models import TINY, probing_weights

from parity import weights
from parity.config import PRESETS
from parity.data.tokenizer import load_tokenizer
from parity.errors import InputError
from parity.storage import download, http_transfer, paths
from parity.storage.download import RemoteFile, fetch
from parity.training import agreement
from parity.weights import openai, openai_files
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
        if isinstance(behaviour, dict):
            handler.send_response(behaviour.get("status", 200))
            for name, value in behaviour.get("headers", {}).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(behaviour.get("body", b""))
            while behaviour.get("drips") and not self.closing.wait(0.02):
                handler.wfile.write(b"x")
            return
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
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "file.lock", "file.verified"}


def test_resumes_where_it_stopped_and_only_the_same_file(server, tmp_path):
    server.script = ["close", "good"]
    get(server, tmp_path)
    headers = server.requests[1][1]
    assert headers["User-Agent"] == "gpt-parity"
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


def test_two_callers_fetch_once(server, tmp_path, monkeypatch, capsys):
    """The second comes while the first downloads. Locks of one process exclude each other like those of two."""
    monkeypatch.setattr(download, "_SILENT_WAIT", 0.01)
    results = []
    second = threading.Thread(target=lambda: results.append(get(server, tmp_path)))

    def start_second(_):
        if second.ident is None:
            second.start()
            second.join(0.2)
            assert second.is_alive()  # it waits for the lock

    results.append(get(server, tmp_path, on_progress=start_second))
    second.join(60)
    assert results == [tmp_path / "file"] * 2
    assert len(server.requests) == 1
    assert capsys.readouterr().err == f"waiting for another process that downloads {tmp_path / 'file'}\n"


@pytest.mark.slow
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
    assert {p.name for p in folder.iterdir() if not p.suffix} == {"part0", "part1", "part2"}
    assert [path for path, _ in server.requests] == [f"/models/124M/part{n}" for n in range(3)]


LONG = "9" * 5000


@pytest.mark.parametrize(
    "answer",
    [
        *({"status": 503, "headers": {"Retry-After": value}} for value in ("\xb2", LONG, "-1", "Mon, 99", "")),
        {"status": 429, "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}},
        *({"headers": {"Content-Length": value}, "body": CONTENT} for value in ("\xb2", LONG, "-5", "\xe9")),
        *({"headers": {"Content-Length": "1280000", "ETag": tag}} for tag in ('"\xb2"', "\xff", f'"{LONG}"', '"')),
        {"status": 206, "headers": {"Content-Range": "bytes \xb2-"}},
    ],
    ids=lambda answer: f"{answer['headers']!a:.50}",
)
def test_headers_of_any_bytes(server, tmp_path, answer):
    server.script = [answer, "good"]
    get(server, tmp_path)
    assert not (tmp_path / "file.part.etag").exists()


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1/x",
        "http://.example/",
        f"http://{'a' * 70}.example/",
        "file:///etc/passwd",
        "http://\xb2\xff:x/",
        "/",
    ],
)
def test_redirects_to_any_bytes(server, tmp_path, location):
    server.script = [{"status": 302, "headers": {"Location": location, "Content-Length": "0"}}]
    with pytest.raises(InputError, match=r"could not be downloaded: http://127"):
        get(server, tmp_path, tries=1)


def test_a_compressed_answer_is_refused(server, tmp_path):
    server.script = [{"headers": {"Content-Encoding": "gzip"}, "body": b"\x1f\x8b"}]
    with pytest.raises(InputError, match="compressed"):
        get(server, tmp_path, RemoteFile("file"))


@pytest.mark.parametrize("tag", [b"\xff\xfe", TAG.encode() + b"\n", b"", b"W/" + TAG.encode(), b'"' * 5000])
def test_a_damaged_tag_starts_over(server, tmp_path, tag):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.etag").write_bytes(tag)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert "Range" not in server.requests[0][1]


def test_parts_that_are_whole_or_too_long(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)  # killed before it got its name
    get(server, tmp_path)
    assert not server.requests
    (tmp_path / "file").unlink()
    for content in (CONTENT[::-1], CONTENT + b"x"):
        (tmp_path / "file.part").write_bytes(content)
        (tmp_path / "file.part.etag").write_text(TAG)
        assert get(server, tmp_path).read_bytes() == CONTENT
        assert "Range" not in server.requests[-1][1]
        (tmp_path / "file").unlink()


def test_a_part_without_a_tag_is_not_continued(server, tmp_path):
    """Not even if the server answers with a range that nobody asked for."""
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    whole = {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}", "Content-Length": f"{len(CONTENT)}"}
    server.script = [{"status": 206, "headers": whole, "body": CONTENT}]
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_is_too_slow_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(http_transfer, "_RATE_WINDOW", 0.1)
    server.script = [{"headers": {"Content-Length": "1280000"}, "drips": True}]
    with pytest.raises(InputError, match=r"sends fewer than 1,000 bytes per second \(2 tries\)"):
        get(server, tmp_path, tries=2)


def test_files_of_unknown_size_have_a_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(http_transfer, "_MOST_BYTES", 1000)
    for behaviour, message in (("good", "offers 1280000 bytes, which are too many"), ("no length", "more than 1,000")):
        server.script = [behaviour]
        with pytest.raises(InputError, match=message):
            get(server, tmp_path, RemoteFile("file"))
    assert not (tmp_path / "file").exists()


def test_structure_is_checked_where_no_hash_is_known(server, tmp_path, monkeypatch):
    """The files of 774M and 1558M, with a tiny model in their place."""
    monkeypatch.setitem(PRESETS, "774M", TINY)
    arrays = weights.convert(probing_weights(TINY, np.float32), "huggingface", "openai", TINY)
    openai.write(tmp_path / "source", TINY, dict(arrays))
    meta = b"\x0a\x04\x0a\x02v1" + b"\x12\x06\x0a\x04node" + b"\x1a\x03\x0a\x01c"
    (tmp_path / "source" / "model.ckpt.meta").write_bytes(meta)
    (tmp_path / "new").mkdir()
    checked = [remote for remote in model_files("774M") if remote.sha256 is None]
    assert [remote.name for remote in checked] == [
        "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001", "model.ckpt.meta",
    ]  # fmt: skip
    for remote in checked:
        target, good = tmp_path / "new" / remote.name, (tmp_path / "source" / remote.name).read_bytes()
        flipped = bytes([*good[:10], good[10] ^ 1, *good[11:]])
        html = b"<!DOCTYPE html><html>sign in</html>"
        other = json.dumps({**json.loads(good), "n_layer": 2}).encode() if remote.name == "hparams.json" else good[::-1]
        damaged = [html, b"", other] + (
            [flipped, good[:-2]] if remote.name != "model.ckpt.meta" else [good[:9], good[:14]]
        )
        for body in damaged:
            server.script = [{"body": body}]
            with pytest.raises(InputError, match="serves another file"):
                fetch(remote, target, [f"{server.url}/{remote.name}"], tries=1)
            assert not target.exists()
            target.write_bytes(body)  # as an earlier version kept it
            with pytest.raises(InputError, match=r"is damaged or is another file.* Delete it"):
                fetch(remote, target, [], offline=True)
            target.unlink()
        server.script = [{"body": good}]
        fetch(remote, target, [f"{server.url}/{remote.name}"])
        assert target.read_bytes() == good
        fetch(remote, target, [])


def test_a_file_that_is_there_is_checked_once(server, tmp_path, monkeypatch):
    read = []

    def counting(path):
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(download, "file_sha256", counting)
    get(server, tmp_path)
    read.clear()
    get(server, tmp_path)
    assert read == []
    get(server, tmp_path, recheck=True)
    os.utime(tmp_path / "file", (1, 1))
    get(server, tmp_path)
    assert len(read) == 2
    (tmp_path / "file.verified").write_bytes(b"\xff")
    get(server, tmp_path)
    assert len(read) == 3
    for content, message in ((CONTENT[::-1], "its sha256 is"), (b"", "it has 0 bytes, expected 1,280,000")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError, match=rf"file is damaged or is another file: {message}.* Delete it"):
            get(server, tmp_path)
        assert (tmp_path / "file").read_bytes() == content  # it may be somebody's own
    assert len(server.requests) == 1


def test_places_that_cannot_be_written(server, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        fetch(REMOTE_FILE, tmp_path / "taken" / "file", [f"{server.url}/file"])
    (tmp_path / "file").mkdir()
    with pytest.raises(InputError, match="it is not a file"):
        get(server, tmp_path)
    (tmp_path / "other.part").mkdir()
    with pytest.raises(InputError, match=r"other\.part cannot be written"):
        fetch(REMOTE_FILE, tmp_path / "other", [f"{server.url}/file"], tries=1)


def test_machines_that_downloaded_the_same_weights_agree(server, tmp_path):
    """What a download leaves beside a file differs between machines."""
    for machine in ("a", "b"):
        (tmp_path / machine).mkdir()
        get(server, tmp_path / machine)
    os.utime(tmp_path / "b" / "file", (1, 1))
    get(server, tmp_path / "b")
    for name in ("lock", "part.etag", "part"):
        (tmp_path / "b" / f"other.{name}").write_text("")
    assert (tmp_path / "a" / "file.verified").read_bytes() != (tmp_path / "b" / "file.verified").read_bytes()
    assert agreement._weights_sha256(tmp_path / "a") == agreement._weights_sha256(tmp_path / "b")
    (tmp_path / "b" / "file").write_bytes(CONTENT[::-1])
    assert agreement._weights_sha256(tmp_path / "a") != agreement._weights_sha256(tmp_path / "b")


def test_switches_and_paths_of_the_environment(monkeypatch, tmp_path):
    for value in ("1", "true", "True", "yes", "YES", "on", " 1 "):
        monkeypatch.setenv("GPT_PARITY_OFFLINE", value)
        assert paths.is_offline()
    for value in ("0", "false", "No", "off", "", " "):
        monkeypatch.setenv("GPT_PARITY_OFFLINE", value)
        assert not paths.is_offline()
    for value in ("2", "never", "tru"):
        monkeypatch.setenv("GPT_PARITY_OFFLINE", value)
        with pytest.raises(InputError, match=f"GPT_PARITY_OFFLINE={value}: set it to"):
            paths.is_offline()
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, folder in (
        ("~/x", tmp_path / "x"),
        ("~", tmp_path),
        ("x/y", paths.Path("x/y")),
        ("/x", paths.Path("/x")),
    ):
        monkeypatch.setenv("GPT_PARITY_CACHE", value)
        assert paths.cache_folder() == folder
    assert str(paths.user_path("~nobody-of-this-name/x")) == "~nobody-of-this-name/x"


def test_the_vocabulary_of_gpt2_is_downloaded_once(server, tmp_path, monkeypatch, vocab_bpe):
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path))
    monkeypatch.setenv("GPT_PARITY_BASE_URL", f"{server.url}/models/")
    server.script = [404]
    with pytest.raises(InputError, match=r"the gpt2 tokenizer needs OpenAI's vocab.bpe: .*404"):
        load_tokenizer("gpt2")
    server.script = [{"body": b"not a vocabulary"}]
    with pytest.raises(InputError, match="the gpt2 tokenizer needs"):
        load_tokenizer("gpt2")
    server.script = [{"body": vocab_bpe.read_bytes()}]
    server.requests.clear()
    assert load_tokenizer("gpt2").encode("The dog") == [464, 3290]
    assert load_tokenizer("gpt2").encode("The dog") == [464, 3290]
    assert [path for path, _ in server.requests] == ["/models/124M/vocab.bpe"]
