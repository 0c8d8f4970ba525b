"""A checkpoint belongs to one run and one step, a run folder has one writer, and damage costs only what is damaged."""

import dataclasses
import json
import os
import shutil
import time
import warnings

import numpy as np
import pytest
from rich.console import Console
from support.models import TINY
from support.runs import metrics

import gpt_jax
import gpt_jax.train
import gpt_jax.train_step
import gpt_torch
import gpt_torch.train
from parity.errors import InputError
from parity.storage import manifest as manifests
from parity.training import checkpoints, job, loop
from parity.training.args import JobArgs, parse_job_args
from parity.training.initial import initial_arrays
from parity.training.job import load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.metrics import Metrics
from parity.training.optimizer_state import read_back
from parity.training.runs import RunFolder, read_run
from parity.training.settings import TrainSettings, recipe

BACKENDS = {"torch": gpt_torch, "jax": gpt_jax}
TRAINERS = {"torch": gpt_torch.train.Trainer, "jax": gpt_jax.train.Trainer}
SETTINGS = recipe("tiny").settings
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40


def parse(*arguments):
    return parse_job_args(JobArgs, None, list(map(str, arguments)))


def begin(*arguments):
    """The job and its trainer, as scripts/train_torch.py makes them."""
    loaded = load_job(parse(*arguments))
    trainer = gpt_torch.train.Trainer(loaded.config, loaded.settings, loaded.init_from)
    return trainer, start_run(loaded, "torch", {}, Console(quiet=True))


def train(*arguments):
    trainer, started = begin(*arguments)
    return resume_and_train(trainer, started, Console(quiet=True))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """A run of four steps with checkpoints 0, 2 and 4; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    options = ("--preset", "tiny", "--steps", 4, "--eval-every", 2, "--sample-tokens", 4, "--corpus", corpus)
    assert train(*options, "--run", run) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta1", 1.0), ("beta1", -0.5), ("beta1", float("nan")), ("beta2", 1.5), ("beta2", 1 - 1e-9),
        ("lr", float("inf")), ("min_lr", float("nan")), ("weight_decay", float("inf")), ("clip", float("inf")),
        ("eps", 1e-300), ("seed", 10**26), ("batch_size", 10**9), ("steps", 2**31), ("sample_temperature", -1.0),
    ],
)  # fmt: skip
def test_values_without_a_meaning_are_refused_before_a_folder_is_made(tmp_path, name, value):
    with pytest.raises(InputError, match=f"^{name} must be between"):
        parse("--preset", "tiny", f"--{name.replace('_', '-')}", value, "--run", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_largest_clip_changes_nothing():
    """Also where the gradient's norm is 0."""
    import jax.numpy as jnp
    import torch

    for values in ([3.0, -4.0], [0.0, 0.0]):
        for largest in (1e30, 5.0):
            gradient = torch.tensor([values])
            norm = gpt_torch.train.clip_by_global_norm([gradient], largest)
            scaled, jax_norm = gpt_jax.train_step.clip_by_global_norm([jnp.array([values])], largest)
            assert gradient.tolist() == np.asarray(scaled[0]).tolist() == [values]
            assert float(norm) == float(jax_norm) == np.linalg.norm(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 12.0), ("steps", None), ("batch_size", 8.0), ("keep", 2.5), ("dtype", "load"), ("dtype", []),
        ("corpus", None), ("corpus", 5), ("seed", 1.5), ("seed", True), ("beta1", None), ("stride", 2.5),
        ("sample_prompt", 5), ("warmup", 10**400), ("init_scheme", "evil"), ("tokenizer", {}),
    ],
)  # fmt: skip
def test_a_config_with_wrong_types_is_refused(run, name, value):
    config = json.loads((run / "config.json").read_text())
    config["train"][name] = value
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"config.json: {name} must be"):
        parse("--run", run, "--resume")


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"model": {}}', '{"model": [], "train": 5}', "[" * 100_000, ""])
def test_a_config_that_is_none_is_refused(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json"):
        parse("--run", run, "--resume")


# A checkpoint belongs to its run and its step


def change_setting(run):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"beta2": 0.99', '"beta2": 0.98'))


def take_config_of_another_run(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "id": "0" * 32}))


@pytest.mark.parametrize(
    ("change", "reason"), [(change_setting, "with other settings"), (take_config_of_another_run, "another run")]
)
def test_checkpoints_of_another_run_or_of_other_settings_are_refused(run, change, reason):
    change(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(InputError, match=reason):
        begin("--run", run, "--resume")
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(InputError, match=reason):
        initial_arrays(TINY, SETTINGS, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("step", "name"), [("000002", "000006"), ("000004", "1000000")])
def test_a_renamed_or_copied_step_is_set_aside(finished, run, step, name):
    shutil.copytree(run / "checkpoints" / step, run / "checkpoints" / name)
    with pytest.warns(UserWarning, match=rf"{name} is (skipped: .* renamed or copied|set aside)"):
        assert train("--run", run, "--resume") == 0
    assert (run / "checkpoints" / f".damaged-{name}").is_dir()
    assert checkpoints.steps(run / "checkpoints") == [0, 2, 4]
    assert weights_of(run / "checkpoints" / "000004") == weights_of(finished / "checkpoints" / "000004")


@pytest.mark.parametrize("text", ["{}", "[]", "null", "5", "[1]", "[" * 50_000, '{"files": {"x": 1}}', '{"a": "b"}'])
def test_a_manifest_that_is_none_counts_as_damage(run, text):
    (run / "checkpoints" / "000004" / "manifest.json").write_text(text)
    with pytest.warns(UserWarning, match="000004 is skipped: its manifest.json"):
        assert RunFolder(run).newest_intact().name == "000002"


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_copied_checkpoint_is_compared_with_its_manifest(run, tmp_path, backend, name):
    copy = shutil.copytree(run / "checkpoints" / "000004", tmp_path / "copy")
    backend.load_pretrained(copy)
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name} is missing or differs from its sha256 in manifest.json"):
        backend.load_pretrained(copy)
    if name == "model.safetensors":  # what is saved last is what loads
        backend.save_pretrained(backend.GPTModel("tiny"), copy)
        assert backend.load_pretrained(copy).config == TINY


def test_a_manifest_of_another_program_is_ignored(run, tmp_path):
    copy = shutil.copytree(run / "checkpoints" / "000004", tmp_path / "copy")
    for text in ('{"name": "web page", "files": ["a"]}', '{"tensors": {}}'):
        (copy / "manifest.json").write_text(text)
        gpt_torch.load_pretrained(copy)


def test_checkpoints_of_version_0_1_are_resumed(finished, run):
    """Their manifests are {file: sha256}, and their config.json has no id."""
    for file in (run / "checkpoints").glob("*/manifest.json"):
        file.write_text(json.dumps(json.loads(file.read_text())["files"]))
    config = json.loads((run / "config.json").read_text())
    del config["id"]
    (run / "config.json").write_text(json.dumps(config))
    shutil.rmtree(run / "checkpoints" / "000004")
    assert train("--run", run, "--resume") == 0
    assert metrics(run) == metrics(finished)
    assert manifests.read(run / "checkpoints" / "000004").step == 4
    assert RunFolder(run).newest_intact().name == "000004"


def test_weights_are_hashed_once(run, monkeypatch):
    for path in run.rglob("*"):
        os.utime(path, (time.time() - 60,) * 2)
    hashed = []
    read = manifests.hash_file
    monkeypatch.setattr(manifests, "hash_file", lambda path: hashed.append(path.name) or read(path))
    args = parse("--init-from", run)
    load_job(dataclasses.replace(args, settings=SETTINGS))
    initial_arrays(args.model, args.settings, args.init_from)
    assert sorted(hashed) == ["config.json", "model.safetensors", "optimizer.safetensors"]


# Retention


def write_weights(folder):
    (folder / "model.safetensors").write_bytes(b"0123456789")


def test_retention_never_deletes_what_was_just_saved(tmp_path):
    for step in (8, 10, 12):
        (tmp_path / f"{step:06d}").mkdir()  # damaged, and newer
    for step in (4, 6):
        checkpoints.save(tmp_path, step, write_weights, keep=2)
    assert checkpoints.steps(tmp_path) == [4, 6, 8, 10, 12]
    with pytest.warns(UserWarning, match="is set aside"):
        checkpoints.set_aside_later(tmp_path, 6)
    assert checkpoints.steps(tmp_path) == [4, 6]


def test_what_cannot_be_deleted_is_reported_and_left(tmp_path, monkeypatch):
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    for step in (1, 2):
        checkpoints.save(folder, step, write_weights, keep=9)
    (folder / "000001").rename(disk)
    (folder / "000001").symlink_to(disk)
    (folder / "000003").write_text("a file")
    (folder / "1²").mkdir()
    (folder / "7").mkdir()
    checkpoints.save(folder, 4, write_weights, keep=2)
    assert checkpoints.steps(folder) == [2, 4]
    assert (disk / "model.safetensors").is_file()  # only the link is deleted

    def busy(path, ignore_errors=False):
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoints.shutil, "rmtree", busy)
    with pytest.warns(UserWarning, match="00000[24] cannot be deleted"):
        checkpoints.save(folder, 5, write_weights, keep=1)
    assert checkpoints.newest_intact(folder).name == "000005"


def test_resuming_a_finished_run_tidies_up(finished, run):
    shutil.copytree(run / "checkpoints" / "000002", run / "checkpoints" / "000001")
    (run / "checkpoints" / "000001" / "manifest.json").unlink()
    (run / "checkpoints" / ".unfinished-000004").mkdir()
    assert train("--run", run, "--resume", "--keep", 1) == 0
    best = RunFolder(run).metrics.best_step()
    assert checkpoints.steps(run / "checkpoints") == sorted({best, 4})
    assert not list((run / "checkpoints").glob(".unfinished*"))


def test_the_best_checkpoint_so_far_is_kept_when_a_later_evaluation_is_forgotten(run):
    """A run that was killed between an evaluation and its save: the loss of that evaluation is not yet the best."""
    shutil.rmtree(run / "checkpoints" / "000004")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in lines:
        if "validation_loss" in entry:
            entry["validation_loss"] = {0: 1.0, 2: 2.0, 4: 0.5}[entry["step"]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    _, resumed = begin("--run", run, "--resume", "--keep", 1)
    resumed.run.unlock()
    assert resumed.resumed_step == 2
    assert checkpoints.steps(run / "checkpoints") == [0, 2]


# metrics.jsonl


@pytest.mark.parametrize(
    "damaged",
    [b'{"step": 2, "lo', b"\0" * 20, b"\xff\xfe{}", b"5", b"{}", b'{"step": "2"}', b'{"step": 2, "loss": []}'],
)
def test_a_damaged_line_costs_that_line(run, damaged):
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    number = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == 1)
    original = b"\n".join([*lines[:number], damaged, *lines[number + 1 :]]) + b"\n"
    file.write_bytes(original)
    with pytest.warns(UserWarning, match=rf"damaged lines \({number + 1}\) are left out; the lines of steps 1 are"):
        assert train("--run", run, "--resume") == 0
    assert file.read_bytes().splitlines() == lines[:number] + lines[number + 1 :]
    assert (run / "metrics.jsonl.damaged").read_bytes() == original


@pytest.mark.parametrize("content", [b"", None, "other"])
def test_metrics_that_are_missing_or_of_another_run_are_reported(run, content):
    file = run / "metrics.jsonl"
    if content is None:
        file.unlink()
    elif content == "other":
        file.write_bytes(file.read_bytes().replace(b'"loss": 5.', b'"loss": 4.'))
    else:
        file.write_bytes(content)
    message = "not those that it had when" if content == "other" else "the lines of steps 1, 2, 3, 4 are missing"
    with pytest.warns(UserWarning, match=message):
        assert train("--run", run, "--resume") == 0


def test_metrics_of_a_long_run_take_little_memory(tmp_path):
    logged = Metrics(tmp_path / "metrics.jsonl", writes=False)
    for step in range(1, 50_001):
        logged.log({"step": step, "loss": 1 / step, "lr": 1.0})
        if step % 1000 == 0:
            logged.log({"step": step, "validation_loss": abs(step - 7000.0)})
    assert 2000 < len(logged.curve) <= 4096
    assert logged.curve[-1][0] > 49_900
    assert logged.best_step() == 7000
    logged.plot(tmp_path / "loss.png", bigram=1.0)
    assert (tmp_path / "loss.png").stat().st_size > 1000


# One writer


def test_a_run_in_use_is_refused(run, corpus):
    _, started = begin("--run", run, "--resume")
    with pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on"):
        begin("--run", run, "--resume")
    started.run.unlock()
    _, again = begin("--run", run, "--resume")
    again.run.unlock()


def test_runs_of_the_same_second_have_folders_of_their_own(monkeypatch, corpus):
    monkeypatch.setattr(job.time, "time", lambda: 1_700_000_000.0)
    assert len({load_job(parse("--preset", "tiny", "--corpus", corpus)).run.path for _ in range(3)}) == 3


@pytest.mark.parametrize("kept", ["checkpoints", "metrics.jsonl"])
def test_no_run_is_begun_over_another_ones_files(run, corpus, kept):
    for path in list(run.iterdir()):
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(path for path in run.rglob("*") if path.name != ".lock")
    with pytest.raises(InputError, match=f"already holds a run .*{kept}"):
        begin("--preset", "tiny", "--corpus", corpus, "--run", run)
    assert sorted(path for path in run.rglob("*") if path.name != ".lock") == before


def test_a_refused_run_leaves_nothing(tmp_path, corpus, monkeypatch):
    def missing(*_):
        raise InputError("--wandb needs a package")

    monkeypatch.setattr(job, "open_loggers", missing)
    for name in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="needs a package"):
            begin("--preset", "tiny", "--corpus", corpus, "--run", tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*") if path.name != ".lock"] == ["empty"]


# Resuming


def test_a_corpus_that_has_moved_is_found_by_its_content(run, corpus, tmp_path):
    moved = shutil.copy(corpus, tmp_path / "moved.txt")
    assert train("--run", run, "--resume", "--corpus", moved) == 0
    assert read_run(RunFolder(run)).settings.corpus == str(moved)
    moved.write_text(TEXT[:-1])
    with pytest.raises(InputError, match="corpus_sha256 was"):
        begin("--run", run, "--resume", "--corpus", moved)
    with pytest.raises(InputError, match="name its new place with --corpus"):
        begin("--run", run, "--resume", "--corpus", tmp_path / "none.txt")


def test_more_steps_need_a_new_run(run):
    with pytest.raises(InputError, match=r"train.steps was 4 and is now 8.*--init-from"):
        begin("--run", run, "--resume", "--steps", 8)


def test_metrics_without_checkpoints_are_not_thrown_away(run):
    (run / "checkpoints").rename(run.parent / "elsewhere")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="metrics up to step 4, but no checkpoint"):
        begin("--run", run, "--resume")
    assert (run / "metrics.jsonl").read_bytes() == before


# What is shown comes after the save


@pytest.mark.parametrize("broken", ["plot", "samples", "text"])
def test_what_is_shown_cannot_end_a_run(tmp_path, corpus, monkeypatch, broken):
    def fail(*_):
        raise RuntimeError("broken")

    options = ("--preset", "tiny", "--steps", 2, "--eval-every", 1, "--sample-tokens", 4, "--corpus", corpus)
    trainer, started = begin(*options, "--run", tmp_path / "run")
    if broken == "plot":
        monkeypatch.setattr(Metrics, "plot", fail)
    elif broken == "samples":
        monkeypatch.setattr(RunFolder, "add_samples", fail)
    else:
        monkeypatch.setattr(type(started.tokenizer), "decode", fail)
    assert resume_and_train(trainer, started, Console(quiet=True)) == 0
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [0, 1, 2]


def test_samples_of_a_run_killed_after_its_save_are_written_when_it_resumes(finished, run, monkeypatch):
    (run / "samples.txt").write_text((run / "samples.txt").read_text().partition("--- step 4")[0])
    assert train("--run", run, "--resume") == 0
    assert (run / "samples.txt").read_text() == (finished / "samples.txt").read_text()


# Paths


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("path", ["a[b]c", "[!x]back\\slash*?"])
def test_any_path_holds_a_checkpoint(tmp_path, name, path):
    trainer = TRAINERS[name](TINY, SETTINGS)
    folder = checkpoints.save(
        tmp_path / path, 3, trainer.save, keep=1, read_back=lambda folder: read_back(folder, TINY)
    )
    for other in TRAINERS.values():
        other(TINY, SETTINGS).restore(folder)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_save_that_cannot_be_read_back_does_not_count(tmp_path, name):
    trainer = TRAINERS[name](TINY, SETTINGS)

    def write_without_moments(folder):
        trainer.save(folder)
        (folder / "optimizer.safetensors").unlink(missing_ok=True)
        for database in folder.rglob("manifest.ocdbt"):
            database.unlink()

    with pytest.raises(InputError, match="000003 could not be written"):
        checkpoints.save(tmp_path, 3, write_without_moments, keep=1, read_back=lambda folder: read_back(folder, TINY))
    assert not list(tmp_path.iterdir())


# Fine-tuning


def test_fine_tuning_has_defaults_of_its_own(tmp_path, run):
    config = dataclasses.replace(TINY, n_vocab=50257)
    gpt_torch.save_pretrained(gpt_torch.GPTModel(config), tmp_path / "weights")
    args = parse("--init-from", tmp_path / "weights")
    settings = args.settings
    assert (args.preset, args.model, settings.tokenizer) == ("fine-tuning", config, "gpt2")
    assert settings.warmup < settings.steps
    assert settings.min_lr < settings.lr
    short = parse("--init-from", tmp_path / "weights", "--steps", 6, "--lr", 1e-6).settings
    assert (short.warmup, short.min_lr) == (1, pytest.approx(1e-7))
    assert parse("--init-from", tmp_path / "weights", "--tokenizer", "bytes").settings.tokenizer == "bytes"
    assert parse("--init-from", run).settings.tokenizer == "bytes"
    assert parse("--init-from", tmp_path / "weights", "--preset", "small").settings.lr == recipe("small").settings.lr


def test_learning_rates_that_contradict_each_other_are_refused(run):
    with pytest.raises(InputError, match=r"--min-lr 0.001: the learning rate cannot fall to it from --lr 1e-05"):
        parse("--preset", "tiny", "--lr", 1e-5, "--min-lr", 1e-3)
    with pytest.raises(InputError, match="needs weights to start from"):
        parse("--preset", "fine-tuning")
    derived = parse("--preset", "124M", "--lr", 1e-5, "--steps", 100).settings
    assert derived.min_lr == pytest.approx(1e-6)
    assert derived.warmup == 10
    assert "never reaches" in job._describe_schedule(TrainSettings(steps=10, warmup=10))
    assert loop.learning_rate(9, derived.lr, derived.min_lr, derived.warmup, derived.steps) == derived.lr


def test_bad_values_of_any_group_are_one_line(capsys):
    for arguments, message in (
        (("--n-embd", 21), "n_embd=21 is not divisible"),
        (("--steps", 0), "steps must be between"),
        (("--batch-size", 7, "--accumulate", 2), "not divisible by accumulate"),
    ):
        with warnings.catch_warnings(), pytest.raises(InputError, match=message):
            parse("--preset", "tiny", *arguments)
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        parse("--preset", "tiny", "--steps", "many")
    assert "many" in capsys.readouterr().err
