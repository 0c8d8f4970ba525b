"""A run that is mirrored: a checkpoint is there whole or not at all, and the run goes on elsewhere bit for bit."""

import dataclasses
import json
import re
import shutil
import threading
import time
import uuid

import pytest
from support.mirrored_runs import (
    SETTINGS,
    add_step,
    assert_same_result,
    files_of,
    make_run,
    train,
    upload,
    uploads_of,
)
from support.runs import run_script
from support.s3_server import s3_environment

from parity.errors import InputError
from parity.storage import bucket, folder, remote, retry
from parity.storage.remote import RemoteError, open_remote
from parity.training import checkpoints, lease, loop, uploads
from parity.training.args import JobArgs, parse_job_args
from parity.training.lease import Lease, SupersededError
from parity.training.mirror import fetch_newest, pull, pull_files
from parity.training.mirrored import MirroredRun
from parity.training.runs import RunFolder

CHANGES = ("put", "write", "create", "remove")


@pytest.fixture(scope="module")
def s3():
    with s3_environment() as server:
        yield server


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.clusters)])
def address(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3').new_bucket()}/run"
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/mirror/run"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(uploads, "LONGEST_PAUSE", 0.01)


def before_each_change(monkeypatch, action):
    """Call action(name of the method, name of the object) before an object is changed."""
    for kind in (bucket.Bucket, folder.Folder):
        for method in CHANGES:
            original = getattr(kind, method)

            def changed(self, *arguments, method=method, original=original):
                action(method, arguments[-1] if method == "put" else arguments[0])
                return original(self, *arguments)

            monkeypatch.setattr(kind, method, changed)


def without_lease(objects):
    return {name: size for name, size in objects.items() if not name.startswith("lease/")}


# What is uploaded


def test_a_mirrored_run_is_a_copy_of_its_folder(tmp_path, address):
    run = make_run(tmp_path / "run", [10, 20])
    upload(run, address, 10, 20, is_new=True)
    source = files_of(run.path)
    assert without_lease(open_remote(address).list()) == {name: len(content) for name, content in source.items()}
    copied = pull(address, tmp_path / "copy")
    assert copied == tmp_path / "copy/checkpoints/000020"
    expected = {name: content for name, content in source.items() if not name.startswith("checkpoints/000010")}
    assert files_of(tmp_path / "copy") == expected
    assert RunFolder(tmp_path / "copy").newest_intact() == copied
    pull(address, tmp_path / "copy", 10)
    assert files_of(tmp_path / "copy") == source
    assert pull_files(address, tmp_path / "files").metrics.best_step() == 20
    assert not (tmp_path / "files/checkpoints").exists()
    with pytest.raises(InputError, match=r"run has no step 15; it has 10, 20"):
        pull(address, tmp_path / "copy", 15)
    with pytest.raises(InputError, match=r"elsewhere holds no run: config.json is missing"):
        pull(f"{address}/elsewhere", tmp_path / "copy")


def test_what_is_there_is_neither_uploaded_nor_fetched_again(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10])
    upload(run, address, 10, is_new=True)
    pull(address, tmp_path / "copy")
    changed, fetched = [], []
    before_each_change(monkeypatch, lambda method, name: changed.append((method, name)))
    get = remote.Remote.get
    monkeypatch.setattr(remote.Remote, "get", lambda *arguments: fetched.append(arguments[1]) or get(*arguments))
    upload(run, address, 10)
    pull(address, tmp_path / "copy")
    assert not [name for _, name in changed if name.startswith("checkpoints/")]
    assert not [name for name in fetched if name.startswith("checkpoints/")]


class KilledError(BaseException):
    """In place of a signal: the process ends at this moment, and handles no exception."""


def test_a_process_that_is_killed_leaves_whole_checkpoints_only(tmp_path, monkeypatch):
    """Before each of its changes in turn, also while an older checkpoint is deleted and a step is written again."""
    run = make_run(tmp_path / "run", [10, 20])
    moment, remaining = 0, [0]

    def count_down(method, name):
        remaining[0] -= 1
        if remaining[0] == -1:
            raise KilledError

    before_each_change(monkeypatch, count_down)
    while remaining[0] <= 0:
        address, remaining[0] = f"memory://{uuid.uuid4().hex}/{moment}", 10**6
        upload(run, address, 10, is_new=True)
        target = MirroredRun(open_remote(address))
        damaged = "checkpoints/000020/manifest.json"  # of an upload of other bytes, which is replaced
        target.remote.write(damaged, b"{}")
        target.remote.write("checkpoints/000020/state/old", b"{}")
        target.remote.write("checkpoints/000005/left", b"")
        remaining[0] = moment
        try:
            names = target.push(run, 20, {}, lambda: None)
            target.retain(names, 20, 1, None, None, lambda: None)
        except KilledError:
            pass
        left, remaining[0] = remaining[0], 10**6
        for step in target.steps():
            if step == 10 or target.remote.read(damaged) != b"{}":
                pull(address, tmp_path / f"copy-{moment}-{step}", step)
                shutil.rmtree(tmp_path / f"copy-{moment}-{step}")
        assert {10, 20} & set(target.steps())
        again = MirroredRun(open_remote(address))
        names = again.push(run, 20, {}, lambda: None)
        again.retain(names, 20, 1, None, None, lambda: None)
        assert again.steps() == [20]
        expected = {n: len(c) for n, c in files_of(run.path).items() if not n.startswith("checkpoints/000010")}
        assert without_lease(target.remote.list()) == expected
        moment, remaining[0] = moment + 1, left
    assert moment > 10


def test_files_that_grow_meanwhile_are_uploaded_as_they_were(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10])
    before = run.metrics_file.read_bytes(), run.samples_file.read_bytes()

    def grow(method, name):
        if name == "checkpoints/000010/model.safetensors":
            run.log({"step": 11, "loss": 1.0})
            run.add_samples(11, ["half a sa"])

    before_each_change(monkeypatch, grow)
    upload(run, address, 10, is_new=True)
    files = open_remote(address)
    assert (files.read("metrics.jsonl"), files.read("samples.txt")) == before


def test_an_upload_lists_the_objects_twice(tmp_path, address, monkeypatch):
    """Before it and after it, also if it deletes others."""
    run = make_run(tmp_path / "run", [10, 20])
    settings = dataclasses.replace(SETTINGS, keep=1, keep_every=None)
    upload(run, address, 10, is_new=True)
    mirror, _ = uploads_of(run, address, settings=settings)
    listed, entries = [], remote.Remote.list
    monkeypatch.setattr(remote.Remote, "list", lambda self, prefix="": listed.append(prefix) or entries(self, prefix))
    with mirror:
        mirror.request(20)
    assert [prefix for prefix in listed if prefix != "lease/"] == ["", ""]
    assert MirroredRun(open_remote(address)).steps() == [20]


def test_the_mirror_keeps_the_checkpoints_that_the_folder_keeps(tmp_path, address):
    run = make_run(tmp_path / "run")
    settings = dataclasses.replace(SETTINGS, keep=2, keep_every=40)
    first = True
    for step in (10, 20, 30, 40, 50, 60, 70):
        add_step(run, step)
        mirror, _ = uploads_of(run, address, first, settings)
        with mirror:
            mirror.request(step)
        first = False
    for step in (80, 90):  # of other programs, and of a machine that came later
        open_remote(address).write(f"checkpoints/0000{step}/manifest.json", b"{}")
    assert MirroredRun(open_remote(address)).steps() == [40, 60, 70, 80, 90]


# Requests


@pytest.fixture
def blocked(monkeypatch):
    """(started, go_on): the first checkpoint whose upload begins waits, until the test lets it go on."""
    started, go_on = threading.Event(), threading.Event()

    def wait(method, name):
        if method == "put" and name.endswith("model.safetensors"):
            started.set()
            assert go_on.wait(60)

    before_each_change(monkeypatch, wait)
    return started, go_on


def test_the_newest_request_replaces_one_that_waits(tmp_path, address, blocked):
    started, go_on = blocked
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, address, True)
    with mirror:
        mirror.request(10)
        assert started.wait(60)
        for step in (20, 30, 40):
            add_step(run, step, mirror.held(), keep=1)
            mirror.request(step)
        held, kept = mirror.held(), checkpoints.steps(run.checkpoints)
        go_on.set()
    assert held == {10, 40}
    assert kept == [10, 30, 40]  # 10 was being uploaded, and 30 waited when 40 was saved
    assert MirroredRun(open_remote(address)).steps() == [10, 40]
    assert printed.getvalue().splitlines()[-1] == f"mirror     step 40 is safe at {mirror.address}"
    assert mirror.held() == set()


def test_the_best_checkpoint_is_uploaded_later_if_a_newer_one_took_its_place(tmp_path, address, blocked):
    started, go_on = blocked
    run = make_run(tmp_path / "run", [10])
    mirror, _ = uploads_of(run, address, True)
    with mirror:
        mirror.request(10)
        assert started.wait(60)
        add_step(run, 20)
        mirror.request(20)
        run.log({"step": 30, "validation_loss": 9.0})
        add_step(run, 40)
        run.metrics.evaluations[40] = 9.0
        mirror.request(40)
        go_on.set()
    assert MirroredRun(open_remote(address)).steps() == [10, 20, 40]
    assert open_remote(address).read("metrics.jsonl") == run.metrics_file.read_bytes()


# Who may write


def test_an_address_that_holds_another_run_is_refused(tmp_path, address):
    run = make_run(tmp_path / "run", [10])
    upload(run, address, 10, is_new=True)
    before = open_remote(address).list()
    other = make_run(tmp_path / "other", [10])
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        uploads_of(other, address, True)
    with pytest.raises(InputError, match=r"holds another run \(id '\w+'\) than"):
        uploads_of(other, address)
    other.unlock()
    with pytest.raises(InputError, match="holds another run"):
        fetch_newest(other, address)
    config = json.loads(other.config_file.read_text())
    del config["id"]
    other.config_file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"version 0.1, whose runs have no id"):
        uploads_of(other, address)
    assert open_remote(address).list() == before
    open_remote(address).remove("config.json")
    with pytest.raises(InputError, match=r"holds checkpoints of a run whose config.json is missing"):
        uploads_of(run, address)


def test_the_older_of_two_machines_is_refused(tmp_path, address):
    run = make_run(tmp_path / "run", [10])
    older, printed = uploads_of(run, address, True)
    with older:
        older.request(10)
        while older.held():
            time.sleep(0.01)
        newer, _ = uploads_of(run, address)
        before = open_remote(address).list()
        add_step(run, 20)
        older.request(20)
    assert open_remote(address).list() == before
    lines = printed.getvalue().splitlines()
    assert any(
        re.search(r" now written by process \d+ .*; this process no longer uploads anything", line) for line in lines
    )
    assert lines[-1].startswith(f"mirror     step 10 is safe at {older.address}; step 20 is not (")
    with newer:
        newer.request(20)
    assert newer.safe == 20


def test_a_newcomer_learns_of_a_process_that_is_still_at_work(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10])
    uploads_of(run, address, True)
    second = uploads.Uploads(address, run, SETTINGS, None)
    assert re.search(r"; process \d+ on .* last wrote to it \d+ s ago and can no longer write$", second.claim(False))
    with uploads_of(run, address)[0]:
        pass  # it says that it has ended
    assert uploads.Uploads(address, run, SETTINGS, None).claim(False) == second.address
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", -1)  # that process has not been heard of for long
    assert uploads.Uploads(address, run, SETTINGS, None).claim(False) == second.address


def test_a_lease_is_renewed_while_nothing_is_uploaded(tmp_path, address, monkeypatch):
    monkeypatch.setattr(uploads, "RENEWAL_SECONDS", 0.01)
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, address, True)
    renewed = threading.Event()
    before_each_change(monkeypatch, lambda method, name: name.startswith("lease/") and renewed.set())
    with mirror:
        assert renewed.wait(60)
        uploads_of(run, address)
        mirror._thread.join(60)
        assert not mirror._thread.is_alive()
    assert "is now written by process" in printed.getvalue()


def test_of_many_leases_taken_at_once_one_is_the_last(address):
    leases = [Lease(open_remote(address)) for _ in range(8)]
    threads = [threading.Thread(target=one.take) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    valid = []
    for one in leases:
        try:
            one.check()
            valid.append(one)
        except SupersededError:
            pass
    assert len(valid) == 1
    assert len({one._number for one in leases}) == 8
    open_remote(address).write("lease/000009.json", b"\xff not json")
    with pytest.raises(SupersededError, match="now written by another process"):
        valid[0].check()


# Failures


def test_a_bucket_that_fails_for_a_while(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, address, True)
    failures = iter([RemoteError("the bucket is full"), OSError("odd"), RemoteError("once more")])

    def fail(method, name):
        if error := next(failures, None):
            raise error

    before_each_change(monkeypatch, fail)
    with mirror:
        mirror.request(10)
    text = printed.getvalue()
    assert text.count("training goes on") == 1
    assert "mirror     the bucket is full; training goes on" in text
    assert "mirror     works again" in text
    assert text.splitlines()[-1] == f"mirror     step 10 is safe at {mirror.address}"


def test_a_bucket_that_refuses_everything_ends_no_run(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10])
    upload(run, address, 10, is_new=True)
    mirror, printed = uploads_of(run, address)
    add_step(run, 20)

    def refuse(method, name):
        raise RemoteError("access is denied")

    before_each_change(monkeypatch, refuse)
    with mirror:
        mirror.request(20)
    assert printed.getvalue().splitlines()[-1] == (
        f"mirror     no step is safe at {mirror.address}; step 20 is not (access is denied); to upload it, run "
        f"--resume --run {run.path} --mirror {mirror.address}"
    )
    assert MirroredRun(open_remote(address)).steps() == [10]


def test_a_bucket_that_fails_for_days(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "LONGEST_PAUSE", 0)
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, f"memory://{uuid.uuid4().hex}", True)
    failures, failed = iter(range(1100)), threading.Event()

    def fail(method, name):
        if next(failures, None) is not None:
            raise RemoteError("the bucket is full")
        failed.set()

    before_each_change(monkeypatch, fail)
    with mirror:
        mirror.request(10)
        assert failed.wait(60)
    assert mirror.safe == 10
    assert "mirror     works again" in printed.getvalue()


def test_failures_at_the_end_are_counted_in_a_row(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10, 20])
    mirror, _ = uploads_of(run, address, True)
    tries = []

    def fail(method, name):
        if method == "put" and name.endswith("model.safetensors"):
            mirror._ending = True
            tries.append(name)
            if len(tries) % uploads.TRIES_AT_THE_END:
                raise RemoteError("the bucket is full")
            if name.startswith("checkpoints/000010"):
                mirror.request(20)

    before_each_change(monkeypatch, fail)
    with mirror:
        mirror.request(10)
    assert len(tries) == 2 * uploads.TRIES_AT_THE_END
    assert mirror.safe == 20


def test_an_error_that_nobody_expects_is_reported(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, address, True)

    def renew(self, ended=False):
        if ended:
            raise KeyError("odd")

    monkeypatch.setattr(Lease, "renew", renew)
    with mirror:
        mirror.request(10)
    assert printed.getvalue().splitlines()[-2:] == [
        "mirror     KeyError: 'odd'; this process no longer uploads anything",
        f"mirror     step 10 is safe at {mirror.address}",
    ]


def test_an_object_that_arrives_with_another_size_is_uploaded_again(tmp_path, address, monkeypatch):
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, address, True)
    name, times = "checkpoints/000010/state/a", []

    def cut(method, changed):
        if changed == "metrics.jsonl" and not times:
            times.append(1)
            open_remote(address).write(name, b"cut")

    before_each_change(monkeypatch, cut)
    with mirror:
        mirror.request(10)
    assert times
    assert f"{name} did not arrive with the size of the file" in printed.getvalue()
    assert mirror.safe == 10
    assert open_remote(address).size(name) == 100


def test_ctrl_c_does_not_wait(tmp_path, address, blocked):
    started, go_on = blocked
    run = make_run(tmp_path / "run", [10])
    mirror, printed = uploads_of(run, address, True)
    mirror.__enter__()
    mirror.request(10)
    assert started.wait(60)
    mirror.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "step 10 is not (its upload was interrupted)" in printed.getvalue()
    go_on.set()
    assert mirror.finished(60)


# Resuming elsewhere


def flip(address, name):
    files = open_remote(address)
    content = bytearray(files.read(name))
    content[len(content) // 2] ^= 1
    files.write(name, bytes(content))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda a: flip(a, "checkpoints/000020/state/a"), "missing or altered: state/a"),
        (lambda a: open_remote(a).remove("checkpoints/000020/state/a"), "state/a is missing"),
        (lambda a: open_remote(a).write("checkpoints/000020/manifest.json", b'{"files'), "is not valid JSON"),
        (
            lambda a: open_remote(a).write(
                "checkpoints/000020/manifest.json",
                json.dumps({"files": {"../../../x": "0" * 64, "model.safetensors": "0" * 64}}).encode(),
            ),
            "is not the manifest of a checkpoint",
        ),
        (
            lambda a: open_remote(a).write(
                "checkpoints/000020/manifest.json", open_remote(a).read("checkpoints/000010/manifest.json")
            ),
            "is missing",
        ),
    ],
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, address, damage, reason):
    run = make_run(tmp_path / "run", [10, 20])
    upload(run, address, 10, 20, is_new=True)
    damage(address)
    with pytest.warns(UserWarning, match=f"a checkpoint is skipped: .*/checkpoints/000020/ is damaged: .*{reason}"):
        assert pull(address, tmp_path / "copy").name == "000010"
    assert checkpoints.steps(tmp_path / "copy/checkpoints") == [10]
    assert not list((tmp_path / "copy/checkpoints").glob(".*"))
    flip(address, "checkpoints/000010/model.safetensors")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(InputError, match=r"no intact checkpoint; .*000010"):
        pull(address, tmp_path / "other")
    with pytest.warns(UserWarning, match="000020/ is damaged"):
        assert pull(address, tmp_path / "copy").name == "000010"  # verified before


def test_the_newest_checkpoint_here_or_there_is_resumed(tmp_path, address):
    run = make_run(tmp_path / "run", [10, 20, 30])
    upload(run, address, 10, 20, 30, is_new=True)
    run.unlock()
    other = RunFolder(shutil.copytree(run.path, tmp_path / "other"))
    shutil.rmtree(other.checkpoints / "000030")
    (other.checkpoints / "000020/model.safetensors").write_bytes(b"")
    other.metrics_file.write_text("")
    with pytest.warns(UserWarning, match="000020 is skipped"):
        fetch_newest(other, address)
    assert other.newest_intact().name == "000030"
    assert other.metrics_file.read_bytes() == run.metrics_file.read_bytes()
    add_step(other, 40)
    before = files_of(other.path)
    fetch_newest(other, address)
    assert files_of(other.path) == before
    open_remote(address).write("checkpoints/000050/manifest.json", b"{}")
    with pytest.warns(UserWarning, match="000050/ is damaged"):
        fetch_newest(other, address)
    assert other.newest_intact().name == "000040"


def test_a_checkpoint_that_is_deleted_while_it_is_fetched(tmp_path, address, monkeypatch):
    """By the process that trains the run: the newer checkpoint is taken, unless the step was named."""
    run = make_run(tmp_path / "run", [10])
    upload(run, address, 10, is_new=True)
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    shutil.copy(run.config_file, other.config_file)
    fetch_step = MirroredRun.fetch_step

    def fetch_late(self, run_folder, step):
        add_step(run, step + 10, keep=1)
        upload(run, address, step + 10)
        for name in open_remote(address).list(f"checkpoints/{step:06d}/"):
            open_remote(address).remove(name)
        monkeypatch.setattr(MirroredRun, "fetch_step", fetch_step)
        return fetch_step(self, run_folder, step)

    monkeypatch.setattr(MirroredRun, "fetch_step", fetch_late)
    assert pull(address, tmp_path / "copy").name == "000020"
    monkeypatch.setattr(MirroredRun, "fetch_step", fetch_late)
    assert fetch_newest(other, address) == []
    assert other.newest_intact().name == "000030"
    monkeypatch.setattr(MirroredRun, "fetch_step", fetch_late)
    with pytest.raises(RemoteError, match=r"checkpoints/000030/manifest.json is missing"):
        pull(address, tmp_path / "copy", 30)


def test_metrics_without_a_checkpoint_are_not_fetched(tmp_path, address):
    """Of a run whose first upload was interrupted: it begins anew."""
    run = make_run(tmp_path / "run", [10])
    upload(run, address, 10, is_new=True)
    open_remote(address).remove("checkpoints/000010/manifest.json")
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    shutil.copy(run.config_file, other.config_file)
    fetch_newest(other, address)
    assert set(files_of(other.path)) == {"config.json"}


def test_bad_options(tmp_path, address):
    def parse(*arguments):
        return parse_job_args(JobArgs, None, list(map(str, arguments)))

    with pytest.raises(InputError, match=r"neither --run .*/run nor --mirror .* holds a run that --resume"):
        parse("--run", tmp_path / "run", "--mirror", address, "--resume")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="an address begins with one of s3://"):
        parse("--run", tmp_path / "run", "--mirror", "bucket/x", "--resume")
    for text, message in (("bucket/x", "an address begins with"), ("s3://key:pw@b/x", "contains credentials")):
        with pytest.raises(InputError, match=message):
            train("torch", "--preset", "tiny", "--steps", 1, "--run", tmp_path / "run", "--mirror", text)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_on_another_machine_the_run_goes_on_bit_for_bit(tmp_path, monkeypatch, backend):
    """Also from the checkpoint before one that is damaged, which is then uploaded again with the same manifest."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    options = ("--preset", "tiny", "--steps", 6, "--eval-every", 2, "--sample-tokens", 4, "--drop-rate", 0.1)
    train(backend, *options, "--corpus", text, "--run", tmp_path / "uninterrupted")
    address = f"file://{tmp_path}/mirror"

    def lost(step, *arguments, original=loop.learning_rate):
        if step == 5:
            raise ConnectionAbortedError("the machine is taken away")
        return original(step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", lost)
        with pytest.raises(ConnectionAbortedError):
            train(backend, *options, "--corpus", text, "--run", tmp_path / "lost", "--mirror", address)
    manifest = (tmp_path / "lost/checkpoints/000004/manifest.json").read_bytes()
    flip(address, "checkpoints/000004/model.safetensors")
    shutil.rmtree(tmp_path / "lost")
    with pytest.warns(UserWarning, match="000004/ is damaged"):
        printed = train(backend, "--run", tmp_path / "run", "--mirror", address, "--resume")
    assert "resuming   after step 2" in printed
    assert printed.splitlines()[-1] == f"mirror     step 6 is safe at {address}"
    assert_same_result(tmp_path / "run", tmp_path / "uninterrupted")
    pull(address, tmp_path / "copy")
    assert_same_result(tmp_path / "copy", tmp_path / "uninterrupted")
    assert (pull(address, tmp_path / "copy", 4) / "manifest.json").read_bytes() == manifest


@pytest.mark.slow
def test_a_tuning_run_goes_on_elsewhere(tmp_path):
    address = f"file://{tmp_path}/mirror"
    small = ("--backend", "torch", "--n-layer", 1, "--n-embd", 16, "--steps", 4, "--eval-every", 2, "--eval-items", 2)
    first = run_script("finetune.py", *small, "--run", tmp_path / "first", "--mirror", address)
    assert first.returncode == 0, first.stderr
    shutil.rmtree(tmp_path / "mirror/checkpoints/000004")
    options = ("--backend", "torch", "--resume", "--run", tmp_path / "run", "--mirror", address)
    resumed = run_script("finetune.py", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming   after step 2" in resumed.stdout
    assert_same_result(tmp_path / "run", tmp_path / "first")
    refused = run_script("train_torch.py", *options[2:-4], "--run", tmp_path / "other", "--mirror", address)
    assert refused.returncode == 2
    assert "is a run of scripts/finetune.py" in refused.stderr
