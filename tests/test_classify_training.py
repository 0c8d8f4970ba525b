"""Training a classifier: every update against the other backend and an oracle, resuming, and checkpoints."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from support import numpy_oracle as oracle
from support.models import BACKENDS, TINY
from support.tolerances import LOGITS_ATOL
from support.trained import full_precision, train_steps

import gpt_jax
import gpt_jax.train
import gpt_torch
import gpt_torch.train
from parity.comparison.compare import compare
from parity.errors import InputError
from parity.training import checkpoints, optimizer_state
from parity.training.settings import recipe
from parity.tuning.classify import last_blocks
from parity.tuning.labeled import LabeledText, LabeledTexts
from parity.weights import initial_weights, peft_files, rows, shapes
from parity.weights.adapters import LoraConfig
from parity.weights.classifier import ClassifierConfig, head_rows, initial_head

PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}
TRAINER = {"torch": gpt_torch.train.Trainer, "jax": gpt_jax.train.Trainer}
names = pytest.mark.parametrize("name", PACKAGES)
PAD, D = TINY.n_vocab - 1, TINY.n_embd
THREE = ClassifierConfig(("a", "b", "c"), PAD)
BOOK = ClassifierConfig(("ham", "spam"), PAD, bias=True, position="last", length=14)
LORA = LoraConfig(rank=3, alpha=7.0, targets=("q", "v"))
PREFIX = "base_model.model.transformer."
KINDS = {
    "all": {"classifier": THREE},
    "last block": {"classifier": BOOK, "table": last_blocks(TINY, 1)},
    "adapters": {"classifier": THREE, "lora": LORA},
}
# Some steps are clipped and others are not; decay and learning rate are large enough to matter.
SETTINGS = dataclasses.replace(
    recipe("tiny").settings, steps=100, batch_size=4, accumulate=2, weight_decay=0.3, dtype="float64"
)
LR = 1e-3
CLIP = {"all": 1.0, "last block": 1.0, "adapters": 1.6}


def settings_of(kind):
    return dataclasses.replace(SETTINGS, clip=CLIP[kind])


def dataset(classifier):
    """Twenty-one texts of different lengths, of which the shortest have the last label."""
    generator = np.random.default_rng(5)
    texts = []
    for number in range(21):
        length = 1 + number % 15
        label = min(length % 3, len(classifier.labels) - 1)
        texts.append(LabeledText(generator.integers(0, PAD, length, dtype=np.int32), label))
    return LabeledTexts(texts, classifier, TINY.n_ctx)


def batch(kind, step):
    """Return the arrays [A, B, ...] of a step."""
    arrays = dataset(KINDS[kind]["classifier"]).batch(0, step, 4)
    return [array.reshape(2, 2, *array.shape[1:]) for array in arrays]


def train(name, kind, steps, change=lambda trainer: None, dtype="float64"):
    """Train, and return ([(loss, norm)], [trained arrays before and after each step]), and check the frozen ones."""
    with full_precision():
        trainer = TRAINER[name](TINY, dataclasses.replace(settings_of(kind), dtype=dtype), **KINDS[kind])
        change(trainer)
        return train_steps(name, trainer, (batch(kind, step) for step in range(steps)), LR)


@pytest.fixture(scope="module")
def runs():
    return {(name, kind): train(name, kind, 100) for name in BACKENDS for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_update_of_a_hundred_steps(runs, kind):
    """In float64. Rounding is some 1e-16, which a hundred steps let grow; 1e-9 of the largest update is allowed."""
    (metrics, trail), (other_metrics, other_trail) = runs["torch", kind], runs["jax", kind]
    np.testing.assert_allclose(other_metrics, metrics, rtol=1e-9)
    assert 5 < (metrics[:, 1] > CLIP[kind]).sum() < 95
    assert metrics[-10:, 0].mean() < 0.9 * metrics[:10, 0].mean()
    for step in range(100):
        for name in trail[0]:
            update = trail[step + 1][name] - trail[step][name]
            other = other_trail[step + 1][name] - other_trail[step][name]
            result = compare(f"step {step} {name}", other, update, 1e-9 * np.abs(update).max() + 1e-300)
            assert result.ok, str(result)


def test_losses_in_float32():
    """A loss moves by at most twice the rounding of a logit, which support/tolerances.py derives."""
    got, want = (train(name, "all", 20, dtype="float32")[0][:, 0] for name in ("jax", "torch"))
    result = compare("losses", got, want, 2 * LOGITS_ATOL[np.float32])
    print(result)
    assert result.ok, str(result)
    exact = train("torch", "all", 20)[0][:, 0]
    assert compare("losses", want, exact, 2 * LOGITS_ATOL[np.float32]).ok
    assert not np.array_equal(want, exact)


def oracle_gradients(arrays, kind, step):
    """The gradients of the trained arrays, from those of transformers' model and the chain rule."""
    classifier, lora = KINDS[kind]["classifier"], KINDS[kind].get("lora")
    whole = {**initial_weights(TINY, SETTINGS.seed, np.float64), **initial_head(TINY, classifier, SETTINGS.seed)}
    scale = 7.0 / 3
    for name, array in arrays.items():
        if "lora_A" in name:
            weight = name.removeprefix(PREFIX).replace(".lora_A.", ".")
            whole[weight] = whole[weight] + scale * (arrays[name.replace("_A", "_B")] @ array).T
        elif "lora_B" not in name:
            whole[name] = array
    inputs, targets, lengths = (part.reshape(4, *part.shape[2:]) for part in batch(kind, step))
    loss, gradients = their_loss_and_gradients(whole, inputs, targets, lengths)
    if lora is None:
        return loss, {name: gradients[name] for name in arrays}
    result = {"score.weight": gradients["score.weight"]}
    for name, a in arrays.items():
        if "lora_A" in name:
            b_name = name.replace("_A", "_B")
            gradient = gradients[name.removeprefix(PREFIX).replace(".lora_A.", ".")].T
            result[name] = scale * arrays[b_name].T @ gradient
            result[b_name] = scale * gradient @ a.T
            result[b_name][:D, 3:] = result[b_name][D : 2 * D] = result[b_name][2 * D :, :3] = 0
    return loss, result


def their_loss_and_gradients(whole, inputs, targets, lengths):
    config = transformers.GPT2Config(
        vocab_size=TINY.n_vocab, n_positions=TINY.n_ctx, n_embd=D, n_head=TINY.n_head, n_layer=TINY.n_layer,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2Model(config).double().eval()
    parameters = {name: torch.tensor(array, dtype=torch.float64) for name, array in whole.items()}
    model.load_state_dict({n: p for n, p in parameters.items() if not n.startswith("score")})
    head = [parameters[n].requires_grad_() for n in parameters if n.startswith("score")]
    x = model(torch.from_numpy(inputs).long()).last_hidden_state
    logits = torch.nn.functional.linear(x[torch.arange(4), torch.from_numpy(lengths).long() - 1], *head)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long())
    named = {**dict(model.named_parameters()), **dict(zip(("score.weight", "score.bias"), head, strict=False))}
    found = torch.autograd.grad(loss, list(named.values()))
    return float(loss.detach()), {n: g.numpy() for n, g in zip(named, found, strict=True)}


def assert_steps_are_the_oracles(run, kind, steps=4):
    metrics, trail = run
    moments = {}
    table = [*rows(TINY), *head_rows(KINDS[kind]["classifier"])]
    decayed = {n for row in table if row.decayed for n in row.names("huggingface", TINY)}
    decayed |= {name for name in trail[0] if "lora_" in name}
    for step in range(steps):
        arrays = trail[step]
        loss, gradients = oracle_gradients(arrays, kind, step)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        np.testing.assert_allclose(metrics[step], (loss, norm), rtol=1e-9)
        expected = oracle.adamw(settings_of(kind), decayed, arrays, gradients, moments, step + 1, LR)
        assert expected.keys() == trail[step + 1].keys()
        for name in expected:
            update = expected[name] - arrays[name]
            result = compare(f"step {step} {name}", trail[step + 1][name] - arrays[name], update,
                             1e-8 * np.abs(update).max() + 1e-300)  # fmt: skip
            assert result.ok, str(result)


@names
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_oracle(runs, name, kind):
    assert_steps_are_the_oracles(runs[name, kind], kind)


def test_what_is_trained(runs):
    """All parameters; the last block, the final norm and the head, as in the book; adapters and the head."""
    trained = {kind: set(runs["torch", kind][1][0]) for kind in KINDS}
    everything = {n for row in rows(TINY) for n in row.names("huggingface", TINY)}
    assert trained["all"] == everything | {"score.weight"}
    last = {n for n in everything if n.startswith(("h.2.", "ln_f."))}
    assert trained["last block"] == last | {"score.weight", "score.bias"}
    assert {n for n in trained["adapters"] if "lora_" not in n} == {"score.weight"}
    assert [row.huggingface for row in last_blocks(TINY, 0)] == []
    everything_but_embeddings = [row for row in rows(TINY) if row.huggingface not in ("wte.weight", "wpe.weight")]
    names = [n for row in last_blocks(TINY, 3) for n in row.names("huggingface", TINY)]
    assert names == [n for row in everything_but_embeddings for n in row.names("huggingface", TINY)]


# Planted errors


def frozen_blocks_decayed(trainer):
    right = trainer.optimizer.step

    def step():
        right()
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if not parameter.requires_grad:
                    parameter.mul_(1 - LR * SETTINGS.weight_decay)

    trainer.optimizer.step = step


def mean_in_place_of_the_sum(trainer):
    right = trainer._objective.summed_loss
    trainer._training_loss.function = lambda model, inputs, *more: right(model, inputs, *more) / len(inputs)


def head_not_trained(trainer):
    for parameter in trainer.model.score.parameters():
        parameter.register_hook(torch.zeros_like)


def position_before_the_last(trainer):
    right = trainer._objective.summed_loss
    trainer._training_loss.function = lambda model, inputs, targets, lengths: right(
        model, inputs, targets, (lengths - 1).clamp(min=1)
    )


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (frozen_blocks_decayed, "last block"),
        (mean_in_place_of_the_sum, "all"),
        (head_not_trained, "adapters"),
        (position_before_the_last, "last block"),
        (position_before_the_last, "all"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_errors_of_training_are_caught(plant, kind):
    with pytest.raises(AssertionError):
        assert_steps_are_the_oracles(train("torch", kind, 2, plant), kind, steps=2)


# Evaluation


@names
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_evaluation_is_of_labels(name, dtype):
    with full_precision():
        trainer = TRAINER[name](TINY, dataclasses.replace(SETTINGS, dtype=dtype), classifier=THREE)
        data = dataset(THREE)
        total, logits, targets = 0.0, [], []
        for arrays in data.in_order(8):
            on_device = trainer.to_device(*arrays)
            total += float(trainer.evaluate_batch(on_device))
            logits.append(trainer.evaluate_rows(on_device))
            targets.append(arrays[1])
    logits, targets = np.concatenate(logits)[:21].astype(np.float64), np.concatenate(targets)
    assert (targets[21:] == -1).all()
    assert len(targets) == 24
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -logprobs[np.arange(21), targets[:21]].sum()
    assert total == pytest.approx(expected, rel=1e-12 if dtype == "float64" else 1e-2)


# Resuming


@pytest.mark.parametrize("kind", ["last block", "adapters"])
def test_runs_resume_in_either_framework(kind, tmp_path):
    """The losses after a resume are exactly those without it, and as near as rounding in the other framework."""
    options, losses = KINDS[kind], {}

    def go_on(trainer, first, last):
        return [
            float(trainer.train_step(trainer.to_device(*batch(kind, s)), LR, s)["loss"]) for s in range(first, last)
        ]

    for name in BACKENDS:
        with full_precision():
            trainer = TRAINER[name](TINY, SETTINGS, **options)
            go_on(trainer, 0, 3)
            (tmp_path / name).mkdir()
            trainer.save(tmp_path / name)
            losses[name] = go_on(trainer, 3, 6)
    for saved in BACKENDS:
        optimizer_state.read_back(tmp_path / saved, trainer.config, trainer.stored)
        for name in BACKENDS:
            with full_precision():
                # Another seed: what is not restored would differ, except for a base, which is the run's.
                settings = SETTINGS if "lora" in options else dataclasses.replace(SETTINGS, seed=1)
                trainer = TRAINER[name](TINY, settings, **options)
                trainer.restore(tmp_path / saved)
                resumed = go_on(trainer, 3, 6)
            if saved == name:
                assert resumed == losses[saved]
            np.testing.assert_allclose(resumed, losses[saved], rtol=1e-12)


@names
def test_checkpoints_are_classifiers(name, tmp_path):
    settings = dataclasses.replace(SETTINGS, dtype="float32")
    trainer = TRAINER[name](TINY, settings, classifier=THREE, lora=LORA)
    trainer.save(tmp_path)
    optimizer = {"torch": "optimizer.safetensors", "jax": "state"}[name]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "classifier.json", optimizer}
    assert peft_files.read(tmp_path, with_head=True).head.keys() == {"score.weight"}
    with pytest.raises(InputError, match="classifier with other options"):
        TRAINER[name](TINY, settings, classifier=dataclasses.replace(THREE, labels=("a", "b")), lora=LORA).restore(
            tmp_path
        )
    with pytest.raises(InputError, match="holds a classifier"):
        TRAINER[name](TINY, settings, lora=LORA).restore(tmp_path)
    with pytest.raises(InputError, match=r"target 3 is not the number of a label \(0\.\.2\)"):
        trainer.to_device(*(np.full_like(part, 3) for part in batch("all", 0)))


@names
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_needs_room_for_the_moments_of_what_is_trained(name, kind, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(checkpoints, "require_space", lambda folder, size: needed.append(size))
    trainer = TRAINER[name](TINY, dataclasses.replace(SETTINGS, dtype="float32"), **KINDS[kind])
    trainer.save(tmp_path)
    stored, trained = (
        4 * sum(math.prod(shape) for shape in shapes(TINY, "torch", table).values())
        for table in (trainer.stored, trainer.trainable)
    )
    state = {"torch": 2 * trained, "jax": 3 * trained + 4}[name]  # JAX writes the parameters again, and a counter
    assert needed == [stored + state]
