"""A run that is mirrored to a server of the S3 protocol, through every failure that a bucket and a machine can have."""

import contextlib
import functools
import itertools
import os
import queue
import random
import shutil
import signal
import urllib.request
import warnings

import pytest
from support.faulty_proxy import FaultyProxy
from support.interrupting import interrupted
from support.killed_uploads import Uploader
from support.mirrored_runs import add_step, assert_same_result, files_of, make_run, upload, uploads_of
from support.models import BACKENDS
from support.runs import run_program, run_script
from support.s3_server import ENVIRONMENT, S3Server

from parity.errors import InputError
from parity.storage.remote import open_remote
from parity.training import mirror, uploads
from parity.training.mirror import pull
from parity.training.mirrored import MirroredRun

pytestmark = pytest.mark.clusters
OPTIONS = ("--preset", "tiny", "--steps", 30, "--eval-every", 10, "--drop-rate", 0.1)  # as in test_resume.py


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy between the clients and the server."""
    proxy = FaultyProxy(server.url)
    for name, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(uploads, "LONGEST_PAUSE", 0.1)
    yield proxy
    proxy.close()


@pytest.fixture
def address(server):
    return f"{server.new_bucket()}/runs/name"


def check_all(address, folder):
    """Fetch and verify every checkpoint that the address shows; return their steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = MirroredRun(open_remote(address)).steps()
        for step in steps:
            pull(address, folder, step)
    shutil.rmtree(folder)
    return steps


@pytest.mark.timeout(1800)
def test_killed_at_random_moments(tmp_path, proxy, address, monkeypatch):
    """By SIGKILL, at 20 requests of uploads that delete the older checkpoints at their end.

    The request at which the process is killed either still reaches the server or does not.
    """
    for module in (mirror, uploads):  # making a client takes longer than all requests of an upload
        monkeypatch.setattr(module, "open_remote", functools.cache(module.open_remote))
    run = make_run(tmp_path / "run", [10, 20])
    choices, seen = random.Random(0), []
    requests, moment, started = itertools.count(), -1, queue.Queue()

    def kill_at(method, path):
        if next(requests) != moment:
            return ""
        os.kill(started.get(timeout=60), signal.SIGKILL)
        return choices.choice(["", "dropped"])

    with contextlib.closing(Uploader()) as uploader:
        upload(run, address, 10, is_new=True)
        proxy.fault = kill_at
        uploader.start(run, address, 20)
        assert uploader.wait() == 0
        total, proxy.fault = next(requests), lambda method, path: ""
        assert check_all(address, tmp_path / "copy") == [20]
        for step in range(30, 230, 10):
            add_step(run, step, keep=2)
            requests, moment, proxy.fault = itertools.count(), choices.randrange(total), kill_at
            started.put(uploader.start(run, address, step))
            assert uploader.wait() == -signal.SIGKILL
            proxy.fault = lambda method, path: ""
            seen.append(check_all(address, tmp_path / "copy")[-1] - step)
            upload(run, address, step)
    assert set(seen) == {-10, 0}
    assert check_all(address, tmp_path / "copy")[-1] == step


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_goes_on_from_the_bucket_bit_for_bit(tmp_path, proxy, address, shared_run, backend):
    uninterrupted = shared_run(f"dropout-{backend}", f"train_{backend}.py", *OPTIONS)[0]
    second_upload = "parity.training.uploads:Uploads._upload:2"
    arguments = (*OPTIONS, "--run", tmp_path / "lost", "--mirror", address)
    lost = run_program(interrupted(signal.SIGKILL, second_upload, f"train_{backend}.py", *arguments))
    assert lost.returncode == -signal.SIGKILL, lost.stdout + lost.stderr
    shutil.rmtree(tmp_path / "lost")
    resumed = run_script(f"train_{backend}.py", "--resume", "--run", tmp_path / "run", "--mirror", address)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming   after step" in resumed.stdout
    assert resumed.stdout.splitlines()[-1] == f"mirror     step 30 is safe at {address}"
    for text in (resumed.stdout, resumed.stderr):
        assert not any(secret in text for secret in (ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], "testing-key"))
    assert_same_result(tmp_path / "run", uninterrupted)
    pull(address, tmp_path / "copy")
    assert_same_result(tmp_path / "copy", uninterrupted)


@pytest.mark.parametrize("fault", ["500", "slow", "dropped", "cut"])
def test_faults_for_a_while(tmp_path, proxy, address, fault):
    """While a checkpoint is uploaded, and while it is fetched."""
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, address, True)

    def some(method, path):
        is_affected = method == "GET" if fault == "cut" else True
        return fault if is_affected and proxy.faults < limit else ""

    limit = 8
    proxy.fault = some
    with mirror:
        mirror.request(10)
    assert mirror.safe == 10, printed.getvalue()
    limit = proxy.faults + 3
    pull(address, tmp_path / "copy")
    assert proxy.faults == limit
    assert files_of(tmp_path / "copy") == files_of(run.path)


@pytest.mark.parametrize(("fault", "reason"), [("403", "Access ?Denied"), ("507", "InsufficientStorage")])
def test_a_bucket_that_is_full_or_refuses(tmp_path, proxy, address, fault, reason):
    run = make_run(tmp_path / "run", [10])
    upload(run, address, 10, is_new=True)
    add_step(run, 20)
    mirror, printed = uploads_of(run, address)
    proxy.fault = lambda method, path: fault if method == "PUT" else ""
    with mirror:
        mirror.request(20)
    assert mirror.safe is None
    assert printed.getvalue().count("training goes on") == 1
    last = printed.getvalue().splitlines()[-1]
    assert last.startswith(f"mirror     no step is safe at {address}; step 20 is not (")
    proxy.fault = lambda method, path: ""
    assert check_all(address, tmp_path / "copy") == [10]
    other = make_run(tmp_path / "other", [10])
    proxy.fault = lambda method, path: fault if method == "PUT" else ""
    with pytest.raises(InputError, match=f"(?i){reason}"):
        uploads_of(other, f"{address}-other", True)


def test_a_server_that_hangs_and_one_that_starts_anew_without_its_objects(tmp_path, monkeypatch):
    server = S3Server()
    try:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(uploads, "LONGEST_PAUSE", 0.1)
        bucket = server.new_bucket()
        run = make_run(tmp_path / "run", [10])
        mirror, printed = uploads_of(run, f"{bucket}/run", True)
        with mirror:
            server.pause()
            mirror.request(10)
            mirror._thread.join(0.5)
            assert mirror.held() == {10}
            server.go_on()
            while mirror.safe != 10:
                mirror._thread.join(0.05)
            server.close()
            add_step(run, 20)
            mirror.request(20)
            while "training goes on" not in printed.getvalue():
                mirror._thread.join(0.05)
            server = S3Server(server.port)
            name = bucket.removeprefix("s3://")
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/{name}", method="PUT"), timeout=30).close()
        assert printed.getvalue().splitlines()[-1] == f"mirror     step 20 is safe at {bucket}/run"
        pull(f"{bucket}/run", tmp_path / "copy")
        expected = {n: c for n, c in files_of(run.path).items() if not n.startswith("checkpoints/000010")}
        assert files_of(tmp_path / "copy") == expected
    finally:
        server.close()


def test_an_altered_object(tmp_path, proxy, address):
    run = make_run(tmp_path / "run", [10, 20])
    upload(run, address, 10, 20, is_new=True)
    files, name = open_remote(address), "checkpoints/000020/model.safetensors"
    files.write(name, bytes(reversed(files.read(name))))
    with pytest.warns(UserWarning, match=r"000020/ is damaged: missing or altered: model.safetensors"):
        assert pull(address, tmp_path / "copy").name == "000010"
