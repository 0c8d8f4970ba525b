"""Nothing saved is lost or silently altered: step folders, damage, full disks, and the other framework's files."""

import contextlib
import dataclasses
import re
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.models import TINY, random_batch
from support.runs import ROOT, command, metrics, run_script

import gpt_jax.adapter
import gpt_jax.checkpoint
import gpt_jax.train
import gpt_torch.train
from parity.config import IGNORE_INDEX
from parity.errors import InputError
from parity.training import checkpoints
from parity.training import optimizer_state as train_state
from parity.training.runs import RunFolder
from parity.training.settings import recipe

SETTINGS = recipe("tiny").settings
TRAINERS = {"torch": gpt_torch.train.Trainer, "jax": gpt_jax.train.Trainer}


@pytest.fixture(params=TRAINERS)
def make(request):
    return TRAINERS[request.param]


def steps(trainer, first, last, lr=1e-3):
    """Train from step `first` to `last`, and return the losses."""
    losses = []
    for step in range(first, last):
        inputs, targets = random_batch(TINY, 4, seed=step)
        losses.append(float(trainer.train_step(trainer.to_device(inputs[None], targets[None]), lr, step)["loss"]))
    return losses


def stored(folder, config=TINY):
    """{part.name: array} of a checkpoint, read without either framework."""
    state = train_state.read(folder, config)
    parts = ("parameters", *train_state.MOMENTS)
    arrays = {f"{p}.{n}": a for p in parts for n, a in state.converted(p, "huggingface", config).items()}
    return {"step": np.int64(state.step), **arrays}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not np.array_equal(a[name], b[name])] == []


def test_restored_state_is_the_saved_one_to_the_bit(make, tmp_path):
    trainer = make(TINY, SETTINGS)
    steps(trainer, 0, 3)
    folder = checkpoints.save(tmp_path, 3, trainer.save, keep=2)
    other = make(TINY, dataclasses.replace(SETTINGS, seed=9))
    other.restore(folder)
    assert_same(stored(checkpoints.save(tmp_path, 4, other.save, keep=2)), stored(folder))
    assert steps(other, 3, 6) == steps(trainer, 3, 6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(TINY, n_layer=2), "h.2|trf_blocks"),
        (dataclasses.replace(TINY, n_embd=24), "wte|tok_emb"),
        (dataclasses.replace(TINY, tied_head=False), "lm_head|out_head"),
    ],
)
def test_another_models_checkpoint_is_refused_with_names(make, tmp_path, config, message):
    folder = checkpoints.save(tmp_path, 0, make(TINY, SETTINGS).save, keep=2)
    other = make(config, SETTINGS)
    with pytest.raises(InputError, match=message):
        other.restore(folder)


def test_another_dtype_is_refused(tmp_path):
    """orbax would cast it silently."""
    folder = checkpoints.save(tmp_path, 0, gpt_jax.train.Trainer(TINY, SETTINGS).save, keep=2)
    with gpt_jax.adapter.jax.enable_x64(True):
        other = gpt_jax.train.Trainer(TINY, dataclasses.replace(SETTINGS, dtype="float64"))
        with pytest.raises(
            InputError, match=r"tok_emb.embedding is .*float32.* in the checkpoint, .*float64.* in this"
        ):
            other.restore(folder)


@pytest.mark.parametrize("writer", TRAINERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_other_framework_resumes(tmp_path, writer, dtype):
    """The optimizer state is restored too: the next losses are those of the framework that wrote the checkpoint."""
    [reader] = TRAINERS.keys() - {writer}
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    with gpt_jax.adapter.jax.enable_x64(dtype == "float64"):
        first = TRAINERS[writer](TINY, settings)
        steps(first, 0, 10)
        folder = checkpoints.save(tmp_path / writer, 10, first.save, keep=2)
        second = TRAINERS[reader](TINY, dataclasses.replace(settings, seed=5))
        second.restore(folder)
        back = checkpoints.save(tmp_path / reader, 10, second.save, keep=2)
        assert_same(stored(back), stored(folder))
        forgetful = TRAINERS[reader](TINY, settings, init_from=folder)  # the weights alone
        want = steps(first, 10, 30)
        assert steps(second, 10, 30) == pytest.approx(want, rel=2e-6 if dtype == "float32" else 1e-12)
        assert steps(forgetful, 10, 30) != pytest.approx(want, rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing(make, tmp_path):
    """If all targets are ignored, the loss is 0/0. The next steps are as if this one had not been made."""
    trainer, undisturbed = make(TINY, SETTINGS), make(TINY, SETTINGS)
    assert steps(trainer, 0, 3) == steps(undisturbed, 0, 3)
    before = stored(checkpoints.save(tmp_path, 3, trainer.save, keep=2))
    inputs, _ = random_batch(TINY, 4)
    bad = trainer.train_step(trainer.to_device(inputs[None], np.full_like(inputs[None], IGNORE_INDEX)), 1e-3, 3)
    assert np.isnan(float(bad["loss"]))
    assert_same(stored(checkpoints.save(tmp_path, 4, trainer.save, keep=2)), before)
    assert steps(trainer, 3, 6) == steps(undisturbed, 3, 6)


# Step folders


def write_something(folder):
    (folder / "model.safetensors").write_bytes(b"0123456789")


def test_retention(tmp_path):
    for step in range(1, 13):
        checkpoints.save(tmp_path, step, write_something, keep=2, keep_every=5, best=3)
    assert checkpoints.steps(tmp_path) == [3, 5, 10, 11, 12]
    run = RunFolder(tmp_path)
    for step, loss in ((0, 5.0), (1, 3.0), (2, 3.0), (3, 4.0)):
        run.log({"step": step, "validation_loss": loss})
    assert run.metrics.best_step() == 1


def test_a_disk_that_is_full_loses_nothing(tmp_path):
    checkpoints.save(tmp_path, 3, write_something, keep=3)

    def full_disk(folder):
        write_something(folder)
        raise OSError(28, "No space left on device")

    for step in (3, 4):
        with pytest.raises(InputError, match="No space left"):
            checkpoints.save(tmp_path, step, full_disk, keep=1)
    assert checkpoints.steps(tmp_path) == [3]
    assert checkpoints.newest_intact(tmp_path).name == "000003"
    assert not list(tmp_path.glob(".unfinished*"))


def test_too_little_space_is_reported_before_anything_is_written(make, tmp_path, monkeypatch):
    trainer = make(TINY, SETTINGS)
    checkpoints.save(tmp_path, 3, trainer.save, keep=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100_000, 40_000, 60_000))
    with pytest.raises(InputError, match=r"0\.\d\d MB are needed, 0\.06 MB are free"):
        checkpoints.save(tmp_path, 4, trainer.save, keep=1)
    assert checkpoints.newest_intact(tmp_path).name == "000003"
    assert [path.name for path in tmp_path.iterdir()] == ["000003"]


@contextlib.contextmanager
def largest_file(size):
    """In this context the system refuses to let a file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_on_a_disk_that_fills_up(name, path):
    trainer = TRAINERS[name](TINY, SETTINGS)
    folder = checkpoints.save(path, 3, trainer.save, keep=3)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for size in (2000, 60_000):
        with largest_file(size), pytest.raises(InputError, match=r"000004 could not be written .*File too large"):
            checkpoints.save(path, 4, trainer.save, keep=1)
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert_same(stored(checkpoints.save(path, 4, trainer.save, keep=2)), stored(folder))


def test_a_disk_that_fills_up_in_the_middle_of_a_save(tmp_path):
    save_on_a_disk_that_fills_up("torch", tmp_path)
    # tensorstore's threads report their errors later, and so in other tests: JAX has a process of its own.
    program = (
        "import pathlib, sys, test_checkpoints as t\nt.save_on_a_disk_that_fills_up('jax', pathlib.Path(sys.argv[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "jax"], capture_output=True, text=True, cwd=ROOT / "tests"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("writes", "seconds"), [(8, 8 * 0.8 + 1), (1000, 30)])
def test_a_failed_save_waits_for_the_writes_that_are_still_running(tmp_path, monkeypatch, writes, seconds):
    """On a clock of its own, which runs only while the function sleeps; a file is written every 0.8 seconds."""
    clock = [100.0]

    def sleep(duration):
        clock[0] += duration
        number = min(writes, int((clock[0] - 100) / 0.8))
        if not (tmp_path / str(number)).exists():
            (tmp_path / str(number)).touch()

    monkeypatch.setattr(gpt_jax.checkpoint, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    gpt_jax.checkpoint._wait_until_unchanged(tmp_path, quiet=1, deadline=30)
    assert clock[0] - 100 == pytest.approx(seconds, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_disk_that_fills_up_in_a_real_run(finished_runs, tmp_path, name):
    """Files may not grow beyond 60 kB: the system refuses the write in the middle of a save."""
    run = tmp_path / "run"
    shutil.copytree(finished_runs[name][0], run)
    shutil.rmtree(run / "checkpoints" / "000060")
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 60 && exec "$@"', "bash", *command(f"train_{name}.py", "--run", run, "--resume")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    # With JAX, tensorstore's own threads write to standard error as well, before, after or in the middle of it.
    assert len(re.findall("error: checkpoint ", result.stderr)) == 1
    assert f"error: checkpoint {run}/checkpoints/000060 could not be written" in result.stderr
    assert name == "jax" or "Traceback" not in result.stderr
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == before
    again = run_script(f"train_{name}.py", "--run", run, "--resume")
    assert again.returncode == 0, again.stderr
    assert metrics(run) == metrics(finished_runs[name][0])


def flip_a_byte(folder):
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_an_array(folder):
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def half_written(folder):
    (folder / checkpoints.MANIFEST).unlink()
    (folder / "model.safetensors").unlink()


def no_optimizer(folder):
    for path in (folder / train_state.ORBAX_FOLDER, folder / train_state.OPTIMIZER_FILE):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def cut_manifest(folder):
    manifest = folder / checkpoints.MANIFEST
    manifest.write_text(manifest.read_text()[:-20])


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """{backend: folder with the checkpoints 20, 40 and 60}, which tests must not change."""
    folders = {}
    for name, trainer in TRAINERS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        for step in (20, 40, 60):
            checkpoints.save(folders[name], step, trainer(TINY, SETTINGS).save, keep=3)
    return folders


@pytest.mark.parametrize("damage", [flip_a_byte, cut_an_array, empty, half_written, no_optimizer, cut_manifest])
@pytest.mark.parametrize("name", TRAINERS)
def test_damage_is_reported_and_the_newest_intact_step_is_used(three_steps, tmp_path, name, damage):
    shutil.copytree(three_steps[name], tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "000060")
    with pytest.warns(UserWarning, match="000060 is skipped: (missing or altered|it has no manifest|its manifest)"):
        newest = checkpoints.newest_intact(tmp_path / "checkpoints")
    assert newest.name == "000040"
    with pytest.raises(InputError, match="000060 is damaged"):
        checkpoints.intact(tmp_path / "checkpoints", 60)
    TRAINERS[name](TINY, SETTINGS).restore(newest)
    for step in ("000020", "000040"):
        damage(tmp_path / "checkpoints" / step)
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(InputError, match="no intact checkpoint"):
        checkpoints.newest_intact(tmp_path / "checkpoints")


def test_optimizer_state_of_a_hostile_file(tmp_path):
    folder = checkpoints.save(tmp_path, 0, TRAINERS["torch"](TINY, SETTINGS).save, keep=1)
    (folder / train_state.OPTIMIZER_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"optimizer.safetensors cannot be read"):
        TRAINERS["torch"](TINY, SETTINGS).restore(folder)
    (folder / train_state.OPTIMIZER_FILE).unlink()
    with pytest.raises(InputError, match="no optimizer state"):
        TRAINERS["jax"](TINY, SETTINGS).restore(folder)
