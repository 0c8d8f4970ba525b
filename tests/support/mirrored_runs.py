"""Runs with small checkpoints, made without training, and the same run trained here and resumed elsewhere."""

import io
import json

import numpy as np
from rich.console import Console

import gpt_jax.train
import gpt_torch.train
from parity.storage.manifest import Manifest
from parity.training import checkpoints
from parity.training.args import JobArgs, parse_job_args
from parity.training.job import load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.run_config import run_config
from parity.training.runs import RunFolder
from parity.training.settings import recipe
from parity.training.uploads import Uploads

TRAINERS = {"torch": gpt_torch.train.Trainer, "jax": gpt_jax.train.Trainer}
SETTINGS = recipe("tiny").settings


def make_run(path, steps=()):
    """Return a new run folder with checkpoints of these steps."""
    run = RunFolder(path)
    run.create(run_config("tiny", recipe("tiny").model, SETTINGS, "0" * 64))
    run.write("reference.json", {"train": []})
    for step in steps:
        add_step(run, step)
    return run


def add_step(run, step, held=(), keep=9):
    """Save a checkpoint, as the training loop does."""
    run.log({"step": step, "validation_loss": 5 - step / 100})
    size, sha256 = run.metrics.flush()
    identity = run.identity()

    def write(folder):
        random = np.random.default_rng(step)
        (folder / "state" / "d").mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "state/a", f"state/d/{random.integers(10**9)}"):
            (folder / name).write_bytes(random.bytes(100))

    def describe(files):
        return Manifest(files, run=identity.run, settings=identity.settings, metrics_size=size, metrics_sha256=sha256)

    checkpoints.save(run.checkpoints, step, write, keep, held=held, describe=describe)
    run.add_samples(step, [f"text {step}"])


def uploads_of(run, address, is_new=False, settings=SETTINGS):
    """Return claimed uploads, and what they print."""
    printed = io.StringIO()
    uploads = Uploads(address, run, settings, Console(file=printed, width=1000))
    uploads.claim(is_new)
    return uploads, printed


def upload(run, address, *steps, is_new=False):
    """Mirror a run's checkpoints of these steps, one after the other."""
    for number, step in enumerate(steps):
        uploads, _ = uploads_of(run, address, is_new and not number)
        with uploads:
            uploads.request(step)
        assert uploads.safe == step


def files_of(folder):
    """Return {path: content} of a run folder, without the lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def train(backend, *arguments):
    """Run what the training scripts run, in this process; return what it prints."""
    printed = io.StringIO()
    console = Console(file=printed, width=1000)
    loaded = load_job(parse_job_args(JobArgs, None, list(map(str, arguments))))
    trainer = TRAINERS[backend](loaded.config, loaded.settings, loaded.init_from)
    assert resume_and_train(trainer, start_run(loaded, backend, {}, console), console) == 0
    return printed.getvalue()


def assert_same_result(run, other):
    """Compare metrics, samples and weights of two run folders, bit for bit."""
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run, other)]
    assert [json.loads(line) for line in lines[0]] == [json.loads(line) for line in lines[1]]
    assert (run / "samples.txt").read_bytes() == (other / "samples.txt").read_bytes()
    newest = [RunFolder(folder).newest_intact() for folder in (run, other)]
    assert newest[0].name == newest[1].name
    assert (newest[0] / "model.safetensors").read_bytes() == (newest[1] / "model.safetensors").read_bytes()
