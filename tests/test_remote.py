"""Objects at addresses: every kind behaves alike, and no message shows a secret."""

import hashlib
import http.server
import os
import sys
import threading
import uuid

import pytest
from support.s3_server import s3_environment

from parity.errors import InputError
from parity.storage import bucket, download, remote
from parity.storage.remote import MissingError, RemoteError, is_address, open_remote

CONTENT = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def s3():
    with s3_environment() as server:
        yield server


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.clusters)])
def address(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3").new_bucket() + "/some/folder"
    return {"memory": f"memory://{uuid.uuid4().hex}/some/folder", "file": f"file://{tmp_path}/some/folder"}[
        request.param
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/x", True),
        ("https://host/x", True),
        ("unknown://x", True),
        ("folder/file", False),
        ("C:/x", False),
        ("s3:/bucket", False),
        (None, False),
    ],
)
def test_is_address(text, expected):
    assert is_address(text) is expected


def test_objects_are_written_listed_read_and_removed(address, tmp_path):
    files, source, target = open_remote(address), tmp_path / "source", tmp_path / "target"
    source.write_bytes(CONTENT)
    files.write("a/manifest.json", b"{}")
    files.write("a/manifest.json", b"{1}")
    files.put(source, "a/deep/weights.bin")
    files.put(source, "ab.bin")
    assert files.list() == {"a/deep/weights.bin": len(CONTENT), "a/manifest.json": 3, "ab.bin": len(CONTENT)}
    assert list(files.list("a/")) == ["a/deep/weights.bin", "a/manifest.json"]
    assert list(files.list("a")) == ["a/deep/weights.bin", "a/manifest.json", "ab.bin"]
    assert files.list("b/") == {}
    assert files.read("a/manifest.json") == b"{1}"
    assert (files.size("ab.bin"), files.size("a"), files.size("nothing")) == (len(CONTENT), None, None)
    files.get("a/deep/weights.bin", target, hashlib.sha256(CONTENT).hexdigest())
    assert target.read_bytes() == CONTENT
    files.remove("ab.bin")
    files.remove("ab.bin")
    assert files.size("ab.bin") is None
    assert open_remote(f"{address}/a/manifest.json").read("") == b"{1}"
    assert open_remote(f"{address}/a/manifest.json").size("") == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


def test_create_is_exclusive(address):
    files = open_remote(address)
    files.create("lease", b"first")
    with pytest.raises(FileExistsError):
        files.create("lease", b"second")
    assert files.read("lease") == b"first"
    files.remove("lease")
    files.create("lease", b"third")
    assert files.read("lease") == b"third"


def test_a_listing_is_never_remembered(address):
    one, other = open_remote(address), open_remote(address)
    one.write("a", b"1")
    assert other.list() == {"a": 1}
    one.write("b", b"12")
    one.write("a", b"123")
    assert other.list() == {"a": 3, "b": 2}
    assert other.size("a") == 3
    one.remove("a")
    assert other.list() == {"b": 2}


def test_what_is_missing_or_altered_is_refused(address, tmp_path):
    files = open_remote(address)
    files.write("a", CONTENT)
    with pytest.raises(MissingError, match=r"some/folder/b is missing"):
        files.read("b")
    with pytest.raises(MissingError, match="is missing"):
        files.get("b", tmp_path / "b")
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(RemoteError, match="is damaged: its sha256"):
        files.get("a", tmp_path / "a", "0" * 64)
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]
    for name in ("../x", "/x", "a/../../x"):
        with pytest.raises(RemoteError, match="must stay beneath"):
            files.write(name, b"")


def test_the_tag_changes_with_the_content(address):
    files = open_remote(address)
    files.write("a", b"1")
    before = files.entry("a")
    files.write("a", b"2")
    assert before.tag
    assert before != files.entry("a")
    assert files.entries() == {"a": files.entry("a")}


@pytest.mark.clusters
def test_a_bucket_that_does_not_exist(s3):
    files = open_remote("s3://no-such-bucket/x")
    for attempt in (lambda: files.read("a"), lambda: files.list(), lambda: files.write("a", b"")):
        with pytest.raises(RemoteError, match="s3://no-such-bucket/x"):
            attempt()


@pytest.mark.clusters
def test_a_large_object_is_whole(s3, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(CONTENT * 100)  # 128 MB: several parts
    files = open_remote(s3.new_bucket())
    files.put(source, "large")
    files.get("large", target, hashlib.sha256(CONTENT * 100).hexdigest())
    assert files.size("large") == 100 * len(CONTENT)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/x", "an address begins with one of s3://, gs://"),
        ("s3:///x", "names no bucket"),
        ("https:///x", "names no server"),
        ("https://user:secret-word@host/x", r"^https://host/x contains credentials; set them in the environment"),
        ("s3://KEY:secret-word@bucket/x", "^s3://bucket/x contains credentials"),
        ("https://[broken/x?secret-word", "not a valid address"),
        ("file://host/x", "three slashes"),
    ],
)
def test_bad_addresses(address, message):
    with pytest.raises(RemoteError, match=message) as error:
        open_remote(address)
    assert "secret-word" not in str(error.value)


@pytest.mark.parametrize(("scheme", "module"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_names_the_extra(scheme, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    extra = {"s3": "s3", "gs": "gcs"}[scheme]
    with pytest.raises(RemoteError, match=rf"{module}.* is not installed; install the extra {extra}"):
        open_remote(f"{scheme}://bucket/x")


def test_offline_opens_no_connection(monkeypatch):
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    for address in ("s3://bucket/x", "https://host/x"):
        with pytest.raises(RemoteError, match="connections are forbidden"):
            open_remote(address)
    open_remote("memory://x")


def test_messages_show_no_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh12345678")
    error = OSError("http://me:pass-word@host/x?X-Amz-Signature=123 with abcdefgh12345678\x1b[0m")
    text = bucket.reason(error)
    for secret in ("me:", "pass-word", "Signature", "abcdefgh", "\x1b"):
        assert secret not in text
    assert "host/x" in text
    assert remote.shown_address("https://host/x/y?token=1#z") == "https://host/x/y"


class _Files(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = {"/data/a%20b.txt": CONTENT, "/data/small": b"x"}.get(self.path.partition("?")[0])
        self.send_response(404 if content is None else 200)
        if "nolength" not in self.path:
            self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", '"tag"')
        self.end_headers()
        if content is not None:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_server_is_read_only(web, tmp_path):
    files = open_remote(f"{web}/data/")
    assert files.entry("a b.txt") == (len(CONTENT), '"tag"')
    files.get("a b.txt", tmp_path / "a", hashlib.sha256(CONTENT).hexdigest())
    assert files.read("small") == b"x"
    assert open_remote(f"{web}/data/small?download=true").read("") == b"x"
    assert files.size("other") is None
    with pytest.raises(MissingError, match=r"/data/other is missing"):
        files.read("other")
    with pytest.raises(RemoteError, match="does not list its files"):
        files.list()
    with pytest.raises(RemoteError, match="that of one file"):
        open_remote(f"{web}/data?key=1").read("small")
    with pytest.raises(RemoteError, match="does not say how large"):
        open_remote(f"{web}/data/small?nolength").read("")
    for attempt in (lambda: files.write("a", b""), lambda: files.create("a", b""), lambda: files.remove("a")):
        with pytest.raises(RemoteError, match="for reading only"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    """Of a server that closes the connection in the middle of a file."""
    monkeypatch.setattr(download, "_LONGEST_WAIT", 0)

    class Cut(_Files):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.send_header("ETag", '"tag"')
            self.end_headers()
            self.wfile.write(b"half")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cut)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(RemoteError, match=r"\(5 tries\)"):
        open_remote(f"http://127.0.0.1:{server.server_port}").get("x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    server.shutdown()
    server.server_close()


def test_a_server_that_is_gone(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    address = f"http://127.0.0.1:{server.server_port}/x"
    server.server_close()
    with pytest.raises(RemoteError, match=r"/x/a: ConnectionError"):
        open_remote(address).read("a")
    assert issubclass(RemoteError, InputError)


def test_files_that_are_removed_during_a_listing(tmp_path, monkeypatch):
    remote = open_remote(tmp_path.as_uri())
    assert remote.list("none/") == {}
    remote.write("a/kept", b"12")
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda *args, **options: ((*at, [*names, "gone"]) for *at, names in walk(*args, **options))
    )
    assert remote.list() == {"a/kept": 2}
    assert remote.size("a/gone") is None
