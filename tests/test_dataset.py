"""The training loop takes any dataset with the members of parity.data.windows.Dataset, here one with masked targets."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console
from support.models import TINY

import gpt_jax.train
import gpt_torch.train
from parity import reference
from parity.config import IGNORE_INDEX
from parity.training.args import JobArgs
from parity.training.initial import initial_arrays
from parity.training.job import load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.settings import recipe

TRAINERS = {"jax": gpt_jax.train.Trainer, "torch": gpt_torch.train.Trainer}
CONFIG = dataclasses.replace(TINY, n_vocab=257)
SETTINGS = dataclasses.replace(recipe("tiny").settings, steps=6, eval_every=3, warmup=1, batch_size=4, accumulate=2)


class Sums:
    """Examples "12+34=46": the prompt up to the equals sign is masked, and so is the padding after the answer."""

    def __init__(self, numbers, n_ctx):
        self.texts = [(f"{a}+{b}=", f"{a + b}\n") for a, b in numbers]
        self.n_ctx = n_ctx

    @property
    def n_targets(self):
        return sum(len(answer) for _, answer in self.texts)

    def _rows(self, numbers):
        inputs = np.zeros((len(numbers), self.n_ctx), np.int32)
        targets = np.full((len(numbers), self.n_ctx), IGNORE_INDEX, np.int32)
        for row, number in enumerate(numbers):
            if number is None:
                continue
            prompt, answer = self.texts[number]
            ids = list((prompt + answer).encode())
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
        return inputs, targets

    def batch_windows(self, seed, step, size):
        return np.random.default_rng([seed, step]).integers(0, len(self.texts), size).tolist()

    def batch(self, seed, step, size, places=None):
        numbers = self.batch_windows(seed, step, size)
        return self._rows([numbers[place] for place in (range(size) if places is None else places)])

    def in_order(self, size, part=slice(None)):
        numbers = [*range(len(self.texts)), *[None] * (-len(self.texts) % size)]
        for start in range(0, len(numbers), size):
            yield self._rows(numbers[start : start + size][part])


def numbers(seed, count):
    return np.random.default_rng(seed).integers(1, 99, (count, 2)).tolist()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{backend: metrics} of a training run on sums."""
    metrics = {}
    for name, trainer_class in TRAINERS.items():
        folder = tmp_path_factory.mktemp("runs") / name
        job = load_job(JobArgs(preset="tiny", run=folder, model=CONFIG, settings=SETTINGS))
        job = dataclasses.replace(
            job, train=Sums(numbers(0, 40), CONFIG.n_ctx), validation=Sums(numbers(1, 5), CONFIG.n_ctx)
        )
        console = Console(quiet=True)
        job = start_run(job, name, {}, console)
        assert resume_and_train(trainer_class(CONFIG, SETTINGS), job, console) == 0
        metrics[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return metrics


def test_both_backends_train_alike_on_masked_targets(runs):
    for a, b in zip(runs["jax"], runs["torch"], strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    losses = [entry["validation_loss"] for entry in runs["jax"] if "validation_loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_only_the_answers_count(runs):
    """The loss before training is that of the NumPy reference over the characters of the answers."""
    arrays = initial_arrays(CONFIG, SETTINGS).arrays
    weights = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    total, count = 0.0, 0
    for prompt, answer in Sums(numbers(1, 5), CONFIG.n_ctx).texts:
        ids = np.frombuffer((prompt + answer).encode(), np.uint8).astype(np.int64)
        logits = reference.logits(CONFIG, weights, ids[None, :-1])[0]
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= log_probs[np.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :].sum()
        count += len(answer)
    assert runs["jax"][0]["validation_loss"] == pytest.approx(total / count, rel=1e-5)
