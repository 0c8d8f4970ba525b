"""The objective of preferences: against NumPy, equal steps in both backends, and errors that are caught."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import numpy_oracle as oracle
from support.models import BACKENDS, TINY, probing_weights
from support.tolerances import LOGITS_ATOL

import gpt_jax
import gpt_jax.lora
import gpt_jax.preference
import gpt_jax.train
import gpt_torch
import gpt_torch.lora
import gpt_torch.preference
import gpt_torch.train
from gpt_jax.loss import CPU_TILING, Tiling
from parity.comparison.compare import compare
from parity.config import IGNORE_INDEX
from parity.training.settings import recipe
from parity.training.trainer import evaluate_all_rows
from parity.tuning.encoding import Example
from parity.tuning.pairs import Pair, Pairs
from parity.weights import initial_weights, rows
from parity.weights.adapters import LoraConfig

CONFIG = dataclasses.replace(TINY, n_layer=1, n_ctx=16)  # all batches have one length, for which JAX compiles once
PACKAGE = {"torch": gpt_torch, "jax": gpt_jax}
PREFERENCE = {"torch": gpt_torch.preference, "jax": gpt_jax.preference}
TRAINER = {"torch": gpt_torch.train.Trainer, "jax": gpt_jax.train.Trainer}
BETA, LR = 0.5, 1e-3
# Some steps are clipped and others are not; decay and learning rate are large enough to matter.
SETTINGS = dataclasses.replace(
    recipe("tiny").settings, steps=100, batch_size=4, accumulate=2, weight_decay=0.3, clip=3.0, dtype="float64"
)
LORA = LoraConfig(rank=3, alpha=7.0)
names = pytest.mark.parametrize("name", BACKENDS)


def exact(dtype="float64"):
    return jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest")


def random_pairs(count=22, seed=0):
    """Pairs whose texts have one prompt of random length and responses of different lengths."""
    generator = np.random.default_rng(seed)
    pairs = []
    for n_prompt in generator.integers(2, 8, count):
        prompt, texts = generator.integers(0, CONFIG.n_vocab, n_prompt), []
        for n_response in generator.integers(1, 10, 2):
            ids = np.concatenate([prompt, generator.integers(0, CONFIG.n_vocab, n_response)]).astype(np.int32)
            targets = ids[1:].copy()
            targets[: n_prompt - 1] = IGNORE_INDEX
            texts.append(Example(ids[:-1], targets))
        pairs.append(Pair(*texts))
    return Pairs(pairs, CONFIG.n_ctx, 0)


# The objective


def oracle_logprobs(weights, pairs, reduction="sum"):
    """The log-probabilities of the responses [len(pairs), 2], one text after another, without padding."""
    result = []
    for pair in pairs.examples:
        for text in pair[:2]:
            logits = oracle.logits(CONFIG, weights, text.inputs[None])[0]
            logits = logits - logits.max(axis=-1, keepdims=True)
            logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            scored = np.flatnonzero(text.targets != IGNORE_INDEX)
            values = logprobs[scored, text.targets[scored]]
            result.append(values.mean() if reduction == "mean" else values.sum())
    return np.reshape(result, (-1, 2))


def backend_logprobs(name, weights, batch, reduction, tiling=CPU_TILING):
    model = BACKENDS[name].build(CONFIG, weights)
    if name == "torch":
        tensors = (torch.from_numpy(array).long() for array in batch)
        with torch.no_grad():
            return gpt_torch.preference.pair_logprobs(model, *tensors, reduction).numpy()
    function = jax.jit(gpt_jax.preference.pair_logprobs, static_argnames=("reduction", "tiling"))
    return np.asarray(function(model, *batch, reduction=reduction, tiling=tiling))


@names
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_logprobs_are_those_of_the_oracle(name, reduction):
    """Also where a row only fills the batch, and, in JAX, one chunk of positions after another."""
    pairs, weights = random_pairs(3), probing_weights(CONFIG)
    [(inputs, targets, _)] = pairs.in_order(4)
    expected = np.concatenate([oracle_logprobs(weights, pairs, reduction), np.zeros((1, 2))])
    x64, precision = exact()
    with x64, precision:
        for tiling in (CPU_TILING, Tiling(8 * CONFIG.n_vocab, 1))[: 2 if name == "jax" else 1]:
            got = backend_logprobs(name, weights, (inputs, targets), reduction, tiling)
            result = compare("log-probabilities", got, expected, 9 * LOGITS_ATOL[np.float64])
            assert result.ok, str(result)


def test_gradients_do_not_depend_on_the_chunks():
    batch = next(random_pairs(4).in_order(4))
    objective = gpt_jax.preference.preference(BETA)
    x64, precision = exact()
    with x64, precision:
        model = BACKENDS["jax"].build(CONFIG, probing_weights(CONFIG))
        function = jax.jit(jax.value_and_grad(objective.summed_loss), static_argnames="tiling")
        batch = (*batch[:2], np.zeros((4, 2)))
        (loss, gradients), (other, others) = (
            function(model, *batch, tiling=tiling) for tiling in (CPU_TILING, Tiling(8 * CONFIG.n_vocab, 1))
        )
        assert float(loss) == pytest.approx(float(other), rel=1e-14)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
            result = compare("gradient", np.asarray(a), np.asarray(b), 1e-12 * np.abs(b).max())
            assert result.ok, str(result)


@names
def test_losses_are_those_of_the_formula(name):
    """Also for margins whose exponential overflows."""
    generator = np.random.default_rng(0)
    logprobs, reference = generator.normal(size=(2, 50, 2)) * np.logspace(-2, 4, 50)[:, None]
    margins = (logprobs[:, 0] - logprobs[:, 1]) - (reference[:, 0] - reference[:, 1])
    x64, precision = exact()
    with x64, precision:
        arrays = (torch.from_numpy(logprobs), torch.from_numpy(reference)) if name == "torch" else (logprobs, reference)
        got = np.asarray(PREFERENCE[name].preference_losses(*arrays, 0.3))
    np.testing.assert_allclose(got, np.logaddexp(0, -0.3 * margins), rtol=1e-13)


# Training


def trainer_of(name, lora=None, dtype="float64", reduction="sum", seed=0):
    settings = dataclasses.replace(SETTINGS, dtype=dtype, seed=seed, clip=0.4 if lora else SETTINGS.clip)
    objective = PREFERENCE[name].preference(BETA, reduction)
    return TRAINER[name](CONFIG, settings, lora=lora, objective=objective)


def batch_of(pairs, step):
    return tuple(array.reshape(2, 2, *array.shape[1:]) for array in pairs.batch(0, step, 4))


def trained_arrays(name, trainer):
    if trainer.lora is not None:
        module = gpt_torch.lora if name == "torch" else gpt_jax.lora
        arrays = module.export_adapter(trainer.model)
    else:
        arrays = PACKAGE[name].export_weights(trainer.model)
    return {n: np.array(array, np.float64) for n, array in arrays.items()}


def train(name, steps, before_step=lambda trainer, pairs, step: None, dtype="float64", **options):
    """Train, and return ([(loss, norm)], [trained arrays before and after each step], the pairs)."""
    pairs = random_pairs()
    x64, precision = exact(dtype)
    with x64, precision:
        trainer = trainer_of(name, dtype=dtype, **options)
        pairs.set_reference(evaluate_all_rows(trainer, pairs, 2))
        metrics, trail = [], [trained_arrays(name, trainer)]
        for step in range(steps):
            before_step(trainer, pairs, step)
            result = trainer.train_step(trainer.to_device(*batch_of(pairs, step)), LR, step)
            metrics.append((float(result["loss"]), float(result["grad_norm"])))
            trail.append(trained_arrays(name, trainer))
    return np.array(metrics), trail, pairs


@pytest.fixture(scope="module")
def runs():
    return {(name, kind): train(name, 100, lora=lora) for name in BACKENDS for kind, lora in KINDS.items()}


KINDS = {"all parameters": None, "adapters": LORA}


@pytest.mark.parametrize("kind", KINDS)
def test_every_update_of_a_hundred_steps(runs, kind):
    (metrics, trail, _), (other_metrics, other_trail, _) = runs["torch", kind], runs["jax", kind]
    result = compare("losses and norms", other_metrics, metrics, 0, 1e-9)
    print(result)
    assert result.ok, str(result)
    assert 5 < (metrics[:, 1] > trainer_of("torch", KINDS[kind]).settings.clip).sum() < 95
    assert metrics[-1, 0] < 0.9 * metrics[0, 0]
    for step in range(100):
        for n in trail[0]:
            update, other = trail[step + 1][n] - trail[step][n], other_trail[step + 1][n] - other_trail[step][n]
            result = compare(f"step {step} {n}", other, update, 1e-9 * np.abs(update).max() + 1e-300)
            assert result.ok, str(result)


def test_losses_of_a_hundred_steps_in_float32():
    """The slope of the loss is at most beta; measured 3e-7."""
    got, want = (train(name, 100, dtype="float32")[0] for name in ("jax", "torch"))
    result = compare("losses", got[:, 0], want[:, 0], rounding("float32"))  # 5e-6
    print(result)
    assert result.ok, str(result)


def rounding(dtype):
    """The largest error of beta times a margin: four log-probabilities of at most 9 tokens, rounded to the dtype."""
    return BETA * 4 * 9 * math.log(CONFIG.n_vocab) * float(np.finfo(dtype).eps) / 2


@names
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_first_loss_is_exactly_ln_2(name, dtype):
    """Where the log-probabilities are the reference's. JAX may round them differently in another program."""
    ln_2 = float(np.log(2).astype(dtype))
    logprobs = np.random.default_rng(0).normal(size=(50, 2)).astype(dtype) * 40
    pairs = random_pairs(4)
    x64, precision = exact(dtype)
    with x64, precision:
        array = torch.from_numpy(logprobs) if name == "torch" else jnp.asarray(logprobs)
        assert set(np.asarray(PREFERENCE[name].preference_losses(array, array, 0.3)).tolist()) == {ln_2}
        trainer = trainer_of(name, dtype=dtype)
        pairs.set_reference(evaluate_all_rows(trainer, pairs, 2))
        batches = list(pairs.in_order(2))
        losses = [float(trainer.evaluate_batch(trainer.to_device(*batch))) / 2 for batch in batches]
        batch = trainer.to_device(*map(np.stack, zip(*batches, strict=True)))
        losses.append(float(trainer.train_step(batch, LR, 0)["loss"]))
    print(max(abs(loss - ln_2) for loss in losses))
    assert losses == ([ln_2] * 3 if name == "torch" else pytest.approx([ln_2] * 3, rel=0, abs=rounding(dtype)))


def test_the_first_loss_of_other_batches_is_ln_2(runs):
    """The reference is computed in other batches than the first step's, so rounding is all that differs."""
    for metrics, _, _ in runs.values():
        assert metrics[0, 0] == pytest.approx(math.log(2), rel=0, abs=rounding("float64"))


# The oracle of a step, and planted errors


def oracle_loss_and_gradients(weights, pairs, step):
    """The loss of a batch, and its gradients: those of the cross-entropy of each text, by the chain rule."""
    inputs, targets, reference = pairs.batch(0, step, 4)
    loss, gradients = 0.0, {}
    for row in range(4):
        texts = [(ids.reshape(2, -1)) for ids in (inputs[row], targets[row])]
        counts = [int((texts[1][k] != IGNORE_INDEX).sum()) for k in range(2)]
        means = [BACKENDS["torch"].loss_and_gradients(CONFIG, weights, *(t[k][None] for t in texts)) for k in range(2)]
        chosen, rejected = (-count * mean for count, (mean, _) in zip(counts, means, strict=True))
        margin = BETA * ((chosen - rejected) - (reference[row, 0] - reference[row, 1]))
        loss += np.logaddexp(0, -margin) / 4
        slope = -BETA / (1 + np.exp(margin)) / 4  # of the loss by the margin of the log-probabilities
        for sign, count, (_, part) in zip((1, -1), counts, means, strict=True):
            for n, gradient in part.items():
                gradients[n] = gradients.get(n, 0) - sign * slope * count * gradient
    return loss, gradients


def assert_steps_are_the_oracles(run, steps=4):
    metrics, trail, pairs = run
    pairs = random_pairs()
    pairs.set_reference(oracle_logprobs(initial_weights(CONFIG, 0, np.float64), pairs))
    decayed = {n for row in rows(CONFIG) if row.decayed for n in row.names("huggingface", CONFIG)}
    moments = {}
    for step in range(steps):
        loss, gradients = oracle_loss_and_gradients(trail[step], pairs, step)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        np.testing.assert_allclose(metrics[step], (loss, norm), rtol=1e-9)
        expected = oracle.adamw(SETTINGS, decayed, trail[step], gradients, moments, step + 1, LR)
        for n in expected:
            update = expected[n] - trail[step][n]
            result = compare(f"step {step} {n}", trail[step + 1][n] - trail[step][n], update,
                             1e-7 * np.abs(update).max() + 1e-300)  # fmt: skip
            assert result.ok, str(result)


@names
def test_steps_are_those_of_the_oracle(runs, name):
    assert_steps_are_the_oracles(runs[name, "all parameters"])


def swapped(monkeypatch):
    right = gpt_torch.preference.preference_losses
    wrong = lambda logprobs, reference, beta: right(logprobs.flip(1), reference.flip(1), beta)  # noqa: E731
    monkeypatch.setattr(gpt_torch.preference, "preference_losses", wrong)
    return {}


def reference_swapped(monkeypatch):
    right = gpt_torch.preference.preference_losses
    wrong = lambda logprobs, reference, beta: right(logprobs, reference.flip(1), beta)  # noqa: E731
    monkeypatch.setattr(gpt_torch.preference, "preference_losses", wrong)
    return {}


def reference_updated(monkeypatch):
    def update(trainer, pairs, step):
        if step == 2:
            pairs.set_reference(evaluate_all_rows(trainer, pairs, 2))

    return {"before_step": update}


def beta_outside(monkeypatch):
    right = gpt_torch.preference.preference_losses
    wrong = lambda logprobs, reference, beta: beta * right(logprobs, reference, 1.0)  # noqa: E731
    monkeypatch.setattr(gpt_torch.preference, "preference_losses", wrong)
    return {}


def mean_for_sum(monkeypatch):
    return {"reduction": "mean"}


PLANTS = {
    "chosen and rejected swapped": swapped,
    "the reference's swapped": reference_swapped,
    "reference updated": reference_updated,
    "mean for sum": mean_for_sum,
    "beta outside of the sigmoid": beta_outside,
}


@pytest.mark.parametrize("plant", PLANTS)
def test_errors_are_caught(plant, monkeypatch):
    with pytest.raises(AssertionError):
        assert_steps_are_the_oracles(train("torch", 4, **PLANTS[plant](monkeypatch)))


@names
def test_rows_that_fill_a_batch_do_not_count(name):
    """The mean over the validation pairs does not depend on the size of the batches, which is 5 or 2 for 22 pairs."""
    pairs = random_pairs()
    x64, precision = exact()
    with x64, precision:
        trainer = trainer_of(name, seed=1)
        pairs.set_reference(np.random.default_rng(0).normal(size=(22, 2)) - 20)
        sums = [
            sum(float(trainer.evaluate_batch(trainer.to_device(*batch))) for batch in pairs.in_order(size))
            for size in (5, 2)
        ]
    assert pairs.n_targets == 22
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
