"""A corpus prepared from objects at addresses has the bytes of one that is prepared from the files."""

import gzip
import http.server
import json
import shutil
import threading
import uuid
from functools import partial

import fsspec
import fsspec.implementations.memory
import pyarrow
import pyarrow.parquet
import pytest
from support.s3_server import s3_environment

from parity.data import sources as sources_module
from parity.data.shard_index import read_index
from parity.data.shards import Request, finish_parts, prepare_part, prepare_shards
from parity.data.sources import find_sources
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.parts import Part
from parity.storage import bucket, retry
from parity.storage.remote import RemoteError, open_remote

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with files of every kind, whose order by path is not that of their names as text."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a").mkdir()
    (folder / "a.txt").write_text("one<|endoftext|>two äöü")
    (folder / "a" / "z.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(40)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n{"text": null}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row one", "row two"]}), folder / "c.parquet")
    (folder / "empty.txt").write_text("")
    (folder / "README.md").write_text("not text for training")
    return folder


def upload(folder, address):
    files = open_remote(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.put(path, path.relative_to(folder).as_posix())
    return address


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.clusters)])
def address(request, texts, tmp_path):
    if request.param == "s3":
        with s3_environment() as server:
            yield upload(texts, f"{server.new_bucket()}/texts")
    else:
        place = {"memory": f"memory://{uuid.uuid4().hex}", "file": f"file://{tmp_path}/bucket"}[request.param]
        yield upload(texts, f"{place}/texts")


@pytest.fixture
def memory(texts):
    return upload(texts, f"memory://{uuid.uuid4().hex}/texts")


def prepare(sources, out, **options):
    return prepare_shards(sources, out, TOKENIZER, validation_fraction=0.1, shard_tokens=200, **options)


def splits(out):
    return read_index(out)["splits"]


def test_folders_and_objects_give_the_shards_of_the_files(texts, address, tmp_path):
    prepare([texts, texts / "a.txt"], tmp_path / "here")
    index = prepare([address, f"{address}/a.txt"], tmp_path / "there")
    assert splits(tmp_path / "here") == splits(tmp_path / "there")
    names = ["a/z.jsonl", "a.txt", "b.jsonl.gz", "c.parquet", "empty.txt", "a.txt"]
    assert [source["path"] for source in index["sources"]] == [f"{address}/{name}" for name in names]
    for source, name in zip(index["sources"], names, strict=True):
        assert source["bytes"] == (texts / name).stat().st_size
        assert source["tag"]
    assert prepare([address, f"{address}/a.txt"], tmp_path / "there") == index  # finished: nothing is done
    assert {path.name for path in (tmp_path / "there").iterdir()} == {p.name for p in (tmp_path / "here").iterdir()}


def test_names_with_the_special_characters_of_addresses(address, tmp_path):
    folder, bucket = tmp_path / "folder", f"{address}/special"
    folder.mkdir()
    for name in ("a%20b.jsonl", "a b.jsonl", "part#1.jsonl", "c?d.txt", "e[1]*.txt", "ä+&=@.txt", "x%2Fy.txt"):
        (folder / name).write_text(json.dumps({"text": name}) if name.endswith(".jsonl") else name)
    upload(folder, bucket)
    expected = prepare([folder], tmp_path / "here")
    index = prepare([bucket], tmp_path / "there")
    assert index["splits"] == expected["splits"]
    assert prepare([bucket], tmp_path / "there") == index
    files = [source["path"] for source in index["sources"]]
    assert prepare(files, tmp_path / "again")["splits"] == index["splits"]


def test_requests_that_fail_for_a_while(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retry, "RETRY_SECONDS", (0,) * 3)
    monkeypatch.setattr(retry, "LONG_RETRY_SECONDS", (0,) * 3)
    expected = prepare([memory], tmp_path / "expected")
    for method in ("entries", "entry", "get"):
        original, calls = getattr(bucket.Bucket, method), []

        def fails(self, *args, original=original, calls=calls):
            calls.append(args)
            if len(calls) % 3:
                raise RemoteError("the bucket is busy")
            return original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(bucket.Bucket, method, fails)
            assert prepare([memory, f"{memory}/a.txt"], tmp_path / method)["sources"][:-1] == expected["sources"]
        assert len(calls) >= 3
        assert not list((tmp_path / method).glob("work"))
    assert "the bucket is busy; trying again in 0 s" in capsys.readouterr().err


def test_parts_and_mixed_sources(texts, tmp_path):
    address = upload(texts, f"file://{tmp_path}/bucket")
    prepare([texts, texts / "a"], tmp_path / "here")
    request = Request([address, str(texts / "a")], tmp_path / "there", TOKENIZER, "text", 0.1, 200)
    for stage in (1, 2):
        for index in (1, 0):
            prepare_part(request, Part(index, 2), stage)
    assert finish_parts(request)["splits"] == splits(tmp_path / "here")


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_files_of_a_web_server(texts, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(texts)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    prepare([texts / "a.txt", texts / "c.parquet"], tmp_path / "here")
    prepare([f"{url}/a.txt", f"{url}/c.parquet"], tmp_path / "there")
    assert splits(tmp_path / "here") == splits(tmp_path / "there")
    for source, message in (
        (f"{url}/none.txt", "none.txt is missing"),
        (f"{url}/a.txt?key=secret-word", "an address with a query"),
    ):
        with pytest.raises(InputError, match=message) as error:
            find_sources([source])
        assert "secret-word" not in str(error.value)
    server.shutdown()
    server.server_close()


def test_the_stand_in_for_the_hub(texts, tmp_path, monkeypatch):
    """No server of the Hugging Face Hub runs here: a file system in memory takes the place of its client."""

    class Hub(fsspec.implementations.memory.MemoryFileSystem):
        protocol = "hf"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hf://").strip("/")

    monkeypatch.setattr(bucket, "CLIENTS", {**bucket.CLIENTS, "hf": ("fsspec", "")})
    fsspec.register_implementation("hf", Hub, clobber=True)
    for path in sorted(texts.rglob("*")):
        if path.is_file():
            Hub().pipe_file(f"datasets/me/mine/{path.relative_to(texts).as_posix()}", path.read_bytes())
    prepare([texts], tmp_path / "here")
    index = prepare(["hf://datasets/me/mine"], tmp_path / "there")
    assert splits(tmp_path / "here") == splits(tmp_path / "there")
    assert index["sources"][0]["path"] == "hf://datasets/me/mine/a/z.jsonl"
    with pytest.raises(RemoteError, match="for reading only"):
        open_remote("hf://datasets/me/mine").write("x", b"")


def test_errors_name_the_address(memory, tmp_path):
    files = open_remote(memory)
    for name, content, message in (
        ("bad.jsonl", b'{"text": "good"}\n{"text": 1}\n', r"^memory://\w+/texts/bad.jsonl, line 2: no text in field"),
        ("bad.txt.gz", gzip.compress(b"x" * 1000)[:-9], r"^memory://\w+/texts/bad.txt.gz is truncated or damaged"),
        ("bad.parquet", b"PAR1nothing", r"^memory://\w+/texts/bad.parquet"),
    ):
        files.write(name, content)
        with pytest.raises(InputError, match=message) as error:
            prepare([f"{memory}/{name}"], tmp_path / name)
        assert "source-" not in str(error.value)
        assert not (tmp_path / name).exists()
    for source, message in (
        ("memory://nothing/x.txt", "nothing/x.txt is missing"),
        ("memory://nothing", "holds no object that ends with .txt"),
        (f"{memory}/data.csv", r"data.csv: this kind of file is not supported"),
        ("unknown://x/y.txt", "an address begins with one of"),
    ):
        with pytest.raises(InputError, match=message):
            find_sources([source])


def test_an_object_that_changes_is_refused(memory, tmp_path, monkeypatch):
    get = bucket.Bucket.get

    def changing(self, name, path, sha256=None):
        get(self, name, path, sha256)
        self.write(name, b"other text")

    monkeypatch.setattr(bucket.Bucket, "get", changing)
    with pytest.raises(InputError, match=r"texts/a.txt changed while it was read"):
        prepare([f"{memory}/a.txt"], tmp_path / "out")
    monkeypatch.undo()
    prepare([f"{memory}/a.txt"], tmp_path / "out")
    open_remote(memory).write("a.txt", b"other words and more")
    with pytest.raises(InputError, match="prepared with other sources"):
        prepare([f"{memory}/a.txt"], tmp_path / "out")


def test_a_source_is_read_again_after_an_interruption(texts, memory, tmp_path, monkeypatch):
    prepare([texts], tmp_path / "here")
    copy, left = sources_module.local_copy, [0, 0, 0]

    def stopping(path, folder):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return copy(path, folder)

    monkeypatch.setattr("parity.data.units.local_copy", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare([memory], tmp_path / "there")
    monkeypatch.undo()
    prepare([memory], tmp_path / "there")
    assert splits(tmp_path / "here") == splits(tmp_path / "there")
    shutil.rmtree(tmp_path / "there")
