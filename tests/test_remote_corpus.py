"""A prepared corpus at an address: the same batches; shards are fetched once, verified, and dropped to make room."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.models import BACKENDS
from support.runs import metrics, run_script
from support.s3_server import S3Server, s3_environment

import gpt_torch.train
from parity.data import shard_cache
from parity.data.corpora import load_corpus
from parity.data.shard_cache import RemoteTokens, cache_limit, corpora_folder, make_room
from parity.data.shards import prepare_shards
from parity.data.tokenizer import ByteTokenizer
from parity.data.windows import Windows
from parity.errors import InputError
from parity.storage import retry
from parity.storage.bucket import Bucket
from parity.storage.remote import RemoteError, open_remote
from parity.training.args import JobArgs, parse_job_args
from parity.training.job import load_job, start_run
from parity.training.loop import resume_and_train

TOKENIZER = ByteTokenizer()
SHARD = 700  # tokens
SIZE = 1024 + 2 * SHARD  # bytes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder with a dozen shards for training and one for validation; not to be changed."""
    base = tmp_path_factory.mktemp("prepared")
    lines = [json.dumps({"text": f"{n}: the quick brown fox jumps over {n * 7919} lazy dogs"}) for n in range(180)]
    (base / "text.jsonl").write_text("\n".join(lines))
    prepare_shards([base / "text.jsonl"], base / "out", TOKENIZER, validation_fraction=0.05, shard_tokens=SHARD)
    assert len(list((base / "out").glob("train_*.bin"))) > 10
    return base / "out"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT_PARITY_CORPUS_CACHE", raising=False)
    monkeypatch.delenv("GPT_PARITY_OFFLINE", raising=False)


def upload(folder, address):
    files = open_remote(address)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".bin", ".json"):
            files.put(path, path.name)
    return address


@pytest.fixture(params=["memory", "file", "http", pytest.param("s3", marks=pytest.mark.clusters)])
def address(request, prepared, tmp_path):
    if request.param == "http":
        yield request.getfixturevalue("web").url
    elif request.param == "s3":
        with s3_environment() as server:
            yield upload(prepared, f"{server.new_bucket()}/corpus")
    else:
        place = {"memory": f"memory://{uuid.uuid4().hex}", "file": f"file://{tmp_path}/bucket"}[request.param]
        yield upload(prepared, f"{place}/corpus")


@pytest.fixture
def bucket(prepared):
    """A copy in memory."""
    return upload(prepared, f"memory://{uuid.uuid4().hex}/corpus")


class Web:
    """Serves a folder, and counts what is asked for."""

    def __init__(self, folder):
        self.asked, outer = [], self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path.removeprefix("/"))
                super().do_GET()

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def web(prepared):
    server = Web(prepared)
    yield server
    server.server.shutdown()
    server.server.server_close()


def cached():
    return sorted(path.name for path in corpora_folder().glob("*/*.bin"))


@pytest.mark.parametrize("order", ["shuffled", "keyed"])
def test_the_batches_are_those_of_the_folder(prepared, address, order):
    here, there = (load_corpus(str(name), TOKENIZER) for name in (prepared, address))
    assert (here.sha256, here.n_tokens) == (there.sha256, there.n_tokens)
    assert (here.is_verified, there.is_verified) == (False, True)
    one, other = (Windows(corpus.train, 16, 257, order=order) for corpus in (here, there))
    assert cached() == []  # nothing is read before it is needed
    for step in (0, 1, 40):
        for a, b in zip(one.batch(3, step, 8), other.batch(3, step, 8), strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(one.batch(3, step, 8, [5, 2])[0], other.batch(3, step, 8, [5, 2])[0])
    one, other = (list(Windows(corpus.validation, 16, 257).in_order(4)) for corpus in (here, there))
    assert all(np.array_equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))
    (folder,) = (path.parent for path in corpora_folder().glob("*/index.json"))
    for name in cached():
        assert (folder / name).read_bytes() == (prepared / name).read_bytes()


def test_slices_of_shards_and_of_their_parts(prepared, bucket):
    here, there = (load_corpus(str(name), TOKENIZER).train[1] for name in (prepared, bucket))
    for part in (slice(None), slice(3, 9), slice(-5, None), slice(10, 50, 7), slice(9, 3), slice(0), slice(690, 900)):
        assert np.array_equal(here[part], there[part])
        assert here[part].dtype == there[part].dtype == np.uint16
        assert np.array_equal(here.part(slice(100, 400))[part], there.part(slice(100, 400))[part])
    assert len(there.part(slice(100, 400))) == 300


def test_validation_is_cut_off_where_there_is_none(tmp_path, prepared):
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    prepare_shards([tmp_path / "text.txt"], tmp_path / "out", TOKENIZER, validation_fraction=0, shard_tokens=SHARD)
    address = upload(tmp_path / "out", f"memory://{uuid.uuid4().hex}")
    here, there = (load_corpus(str(name), TOKENIZER, 0.3) for name in (tmp_path / "out", address))
    assert [len(shard) for shard in here.validation] == [len(shard) for shard in there.validation]
    assert np.array_equal(here.validation[0][:], there.validation[0][:])
    assert np.array_equal(here.train[-1][:], there.train[-1][:])


_READ_ALL = """
import sys
from parity.data.corpora import load_corpus
from parity.data.tokenizer import ByteTokenizer
print(sum(int(shard[:].sum()) for shard in load_corpus(sys.argv[1], ByteTokenizer()).train))
"""


def test_one_process_of_a_machine_fetches_a_shard(prepared, web):
    processes = [
        subprocess.Popen([sys.executable, "-c", _READ_ALL, web.url], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    sums = {process.communicate(timeout=120)[0] for process in processes}
    assert sums == {f"{sum(int(s[:].sum()) for s in load_corpus(str(prepared), TOKENIZER).train)}\n"}
    shards = [name for name in web.asked if name.startswith("train")]
    assert all(shards.count(name) == 2 for name in set(shards))  # its size, and the shard
    assert len(set(shards)) == len(cached())
    assert not list(corpora_folder().glob("*/*.part"))


def test_shards_are_fetched_ahead(bucket):
    corpus = load_corpus(bucket, TOKENIZER)
    data = Windows(corpus.train, 16, 257)
    needed = {data._shard_numbers([w])[0] for step in range(16) for w in data.batch_windows(0, step, 2)}
    assert len(needed) > 4
    data.batch(0, 0, 2)
    for future in list(corpus.train[0].cache._pending.values()):
        future.result(60)
    assert cached() == sorted(corpus.train[number].shard.name for number in needed)


def test_the_cache_is_bounded_and_drops_what_was_used_least_recently(prepared, bucket, monkeypatch):
    monkeypatch.setenv("GPT_PARITY_CORPUS_CACHE", f"{3 * SIZE}")
    with pytest.warns(UserWarning, match="shards will be fetched again and again"):
        corpus = load_corpus(bucket, TOKENIZER)
    for number in (0, 1, 2, 0):
        corpus.train[number][:5]
        os.utime(next(corpora_folder().glob(f"*/train_{number:06d}.bin")), ns=(0, 10**9 * (number or 5)))
    assert cached() == [f"train_{n:06d}.bin" for n in (0, 1, 2)]
    corpus.train[3][:5]
    assert cached() == [f"train_{n:06d}.bin" for n in (0, 2, 3)]
    here = load_corpus(str(prepared), TOKENIZER)
    one, other = Windows(here.train, 16, 257), Windows(corpus.train, 16, 257)
    for step in range(6):
        assert np.array_equal(one.batch(0, step, 8)[0], other.batch(0, step, 8)[0])
        assert len(cached()) <= 3 + 4  # and those being fetched
    cache = corpus.train[0].cache
    for name in list(cache._pending):
        cache._pending[name].result(60)
    make_room(corpora_folder(), 3 * SIZE)
    assert len(cached()) <= 3


def test_a_shard_that_another_process_deletes_is_fetched_again(prepared, bucket):
    shard, expected = (load_corpus(str(name), TOKENIZER).train[2] for name in (bucket, prepared))
    for _ in range(2):
        assert np.array_equal(shard[:], expected[:])
        next(corpora_folder().glob("*/train_000002.bin")).unlink()


def test_what_a_killed_process_left_is_removed(bucket):
    shard = load_corpus(bucket, TOKENIZER).train[0]
    left = shard.cache.folder / f"{shard.shard.name}.0123abcd.part"
    left.write_bytes(b"half")
    shard[:1]
    assert not left.exists()


def test_a_damaged_shard_is_named(bucket, prepared, monkeypatch, capsys):
    monkeypatch.setattr(retry, "LONG_RETRY_SECONDS", (0.0,) * 9)
    content = bytearray((prepared / "train_000001.bin").read_bytes())
    content[1500] ^= 1
    open_remote(bucket).write("train_000001.bin", bytes(content))
    corpus = load_corpus(bucket, TOKENIZER)
    with pytest.raises(RemoteError, match=r"corpus/train_000001.bin is damaged: its sha256 is"):
        corpus.train[1][:1]
    assert capsys.readouterr().err.count("trying again") == 1
    assert cached() == []
    assert len(corpus.train[0][:]) == SHARD  # the others are not affected
    open_remote(bucket).put(prepared / "train_000001.bin", "train_000001.bin")
    assert len(corpus.train[1][:]) == SHARD


def test_failures_that_pass_are_tried_again(bucket, prepared, monkeypatch, capsys):
    monkeypatch.setattr(retry, "LONG_RETRY_SECONDS", (0.0,) * 3)
    shard = load_corpus(bucket, TOKENIZER).train[0]
    get, failures = shard.cache.remote.get, [RemoteError("the bucket is busy")] * 2

    def fails(*args):
        if failures:
            raise failures.pop()
        get(*args)

    monkeypatch.setattr(shard.cache.remote, "get", fails)
    assert shard[:].tobytes() == (prepared / "train_000000.bin").read_bytes()[1024:]
    assert capsys.readouterr().err.count("the bucket is busy; trying again in 0 s") == 2
    shutil.rmtree(corpora_folder())
    corpora_folder().joinpath(shard.cache.folder.name).mkdir(parents=True)
    failures += [RemoteError("the bucket is gone")] * 4
    with pytest.raises(RemoteError, match="the bucket is gone"):
        shard[:]


@pytest.mark.parametrize("limit", ["", "1GB"])
def test_cached_shards_make_room_when_other_files_fill_the_disk(bucket, prepared, monkeypatch, limit):
    monkeypatch.setenv("GPT_PARITY_CORPUS_CACHE", limit)
    here, there = (load_corpus(str(name), TOKENIZER).train for name in (prepared, bucket))

    def two_shards(path):
        free = 2 * SIZE + 100 - sum(file.stat().st_size for file in corpora_folder().glob("*/*.bin"))
        return shutil._ntuple_diskusage(10**9, 10**9 - free, free)

    there[0][:1]
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", two_shards)
    for number in range(4):
        assert np.array_equal(here[number][:], there[number][:])
        os.utime(next(corpora_folder().glob(f"*/train_{number:06d}.bin")), ns=(0, 10**9 * number))
    assert cached() == [f"train_{n:06d}.bin" for n in ((2, 3) if limit else (3,))]


@pytest.mark.parametrize("size", [SIZE, SIZE - 2, SIZE + 2, 0])
def test_a_cached_shard_that_was_altered_is_fetched_again(prepared, bucket, capsys, size):
    here, there = (load_corpus(str(name), TOKENIZER).train[1] for name in (prepared, bucket))
    assert np.array_equal(here[:], there[:])
    file = next(corpora_folder().glob("*/train_000001.bin"))
    file.write_bytes(bytes(size))
    if size == SIZE:  # only a new process reads all of it
        there = load_corpus(bucket, TOKENIZER).train[1]
    assert np.array_equal(here[:], there[:])
    assert capsys.readouterr().err == f"{file} is damaged; it is fetched again\n"


def test_no_room_on_the_disk(bucket, monkeypatch):
    shard = load_corpus(bucket, TOKENIZER).train[0]
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))
    with pytest.raises(InputError, match=r"has 100 bytes free, but memory://.*train_000000.bin needs 2,424"):
        shard[:]


def test_an_index_that_cannot_be_read_at_first(bucket, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", (0, 0))
    read, failures = Bucket.read, [RemoteError("the bucket is busy")] * 2

    def fails(*args):
        if failures:
            raise failures.pop()
        return read(*args)

    monkeypatch.setattr(Bucket, "read", fails)
    assert len(load_corpus(bucket, TOKENIZER).train) > 10


def test_steps_look_ahead_from_time_to_time(bucket, monkeypatch):
    data, counts = Windows(load_corpus(bucket, TOKENIZER).train, 16, 257), []
    batch_windows = Windows.batch_windows
    monkeypatch.setattr(Windows, "batch_windows", lambda *args: counts.append(args[2]) or batch_windows(*args))
    for step in range(3, 19):
        data.batch(0, step, 2)
    assert sorted(counts) == sorted([*range(3, 19), *range(3, 19), *range(11, 27)])


def test_bad_corpora_at_addresses(bucket, prepared, monkeypatch):
    with pytest.raises(InputError, match=r"index.json is missing; a corpus at an address is a folder"):
        load_corpus("memory://nothing/here", TOKENIZER)
    files = open_remote(bucket)
    index = json.loads((prepared / "index.json").read_text())
    for content, message in (
        (b"{", "corpus/index.json is not valid JSON"),
        (json.dumps({**index, "tokenizer": "gpt2"}).encode(), "was prepared with the gpt2 tokenizer"),
        (json.dumps({**index, "splits": {}}).encode(), "train is missing"),
    ):
        files.write("index.json", content)
        with pytest.raises(InputError, match=message):
            load_corpus(bucket, TOKENIZER)
    files.put(prepared / "index.json", "index.json")
    for text, message in (("much", "give a size such as 500GB"), ("2KB", "has shards of 2,424 bytes")):
        monkeypatch.setenv("GPT_PARITY_CORPUS_CACHE", text)
        with pytest.raises(InputError, match=message):
            load_corpus(bucket, TOKENIZER)
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    with pytest.raises(InputError, match="connections are forbidden"):
        load_corpus("s3://bucket/x", TOKENIZER)


@pytest.mark.parametrize(
    ("text", "size"), [("500GB", 500 * 10**9), ("2 tb", 2 * 10**12), ("1.5KB", 1500), ("123", 123), ("7B", 7)]
)
def test_limits(monkeypatch, text, size):
    monkeypatch.setenv("GPT_PARITY_CORPUS_CACHE", text)
    assert cache_limit() == size


def _train(*arguments):
    job = load_job(parse_job_args(JobArgs, None, list(map(str, arguments))))
    trainer = gpt_torch.train.Trainer(job.config, job.settings, job.init_from)
    assert resume_and_train(trainer, start_run(job, "torch", {}, Console(quiet=True)), Console(quiet=True)) == 0
    return job


def test_a_run_moves_between_folder_and_address(prepared, bucket, tmp_path):
    """Its tokens are the same, so its losses are, and either is accepted when it resumes."""
    options = ("--preset", "tiny", "--steps", 2, "--eval-every", 2, "--sample-tokens", 4, "--n-ctx", 16)
    one, other = tmp_path / "one", tmp_path / "other"
    _train(*options, "--corpus", prepared, "--run", one)
    _train(*options, "--corpus", bucket, "--run", other)
    assert metrics(one) == metrics(other)
    samples = [json.loads((run / "config.json").read_text())["corpus_samples"] for run in (one, other)]
    assert samples[1] is None
    for run, corpus in ((other, prepared), (one, bucket)):
        job = _train("--run", run, "--resume", "--corpus", corpus)
        assert job.corpus.name == str(corpus)
        assert isinstance(job.corpus.train[0], RemoteTokens) == (corpus == bucket)
    assert json.loads((one / "config.json").read_text())["corpus_samples"] == samples[0]
    changed = tmp_path / "changed"
    shutil.copytree(prepared, changed)
    index = json.loads((changed / "index.json").read_text())
    index["splits"]["train"]["done"][0]["sha256"] = "0" * 64
    (changed / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="corpus_sha256 was"):
        _train("--run", one, "--resume", "--corpus", upload(changed, f"memory://{uuid.uuid4().hex}"))


class _Faulty(http.server.BaseHTTPRequestHandler):
    """Passes requests on to an S3 server, but the first answers with a shard fail."""

    server_url, faults = "", []

    def do_GET(self):
        request = urllib.request.Request(self.server_url + self.path, headers=dict(self.headers), method=self.command)
        fault = self.faults.pop(0) if self.command == "GET" and ".bin" in self.path and self.faults else None
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, headers, body = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            status, headers, body = error.code, error.headers, error.read()
        if fault == 500:
            status, body = 500, b"<Error><Code>InternalError</Code></Error>"
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers["Content-Length"] if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.mark.clusters
def test_a_server_that_fails_and_cuts_answers_off(prepared, monkeypatch):
    monkeypatch.setattr(retry, "LONG_RETRY_SECONDS", (0.0,) * 5)
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    corpus = upload(prepared, f"{server.new_bucket()}/corpus")
    monkeypatch.setattr(_Faulty, "server_url", server.url)
    monkeypatch.setattr(_Faulty, "faults", [500, "cut", "cut", 500, "cut", "cut", "cut", 500])
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Faulty)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    here, there = (load_corpus(str(name), TOKENIZER).train for name in (prepared, corpus))
    for one, other in zip(here, there, strict=True):
        assert np.array_equal(one[:], other[:])
    assert _Faulty.faults == []
    proxy.shutdown()
    proxy.server_close()
    server.close()


@pytest.mark.clusters
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_from_s3(prepared, tmp_path, backend):
    server = S3Server()
    environment = {**os.environ, **server.environment, "GPT_PARITY_CACHE": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        corpus = upload(prepared, f"{server.new_bucket()}/corpus")
    options = ("--preset", "tiny", "--steps", 6, "--eval-every", 3, "--n-ctx", 16)
    runs = {}
    for name, place in (("here", prepared), ("there", corpus)):
        runs[name] = tmp_path / name
        done = run_script(f"train_{backend}.py", *options, "--corpus", place, "--run", runs[name], env=environment)
        assert done.returncode == 0, done.stderr
        assert server.environment["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    assert metrics(runs["here"]) == metrics(runs["there"])
    assert Path(tmp_path / "cache" / "corpora").is_dir()
    server.close()
