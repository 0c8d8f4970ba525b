"""The JAX training step computes the right values, compiles once, copies nothing, and ignores padding."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TINY, random_batch

import gpt_jax
from gpt_jax.loss import summed_loss
from gpt_jax.train import Trainer, cast
from parity.comparison.compare import compare
from parity.training.settings import recipe
from parity.weights import rows

SETTINGS = recipe("tiny").settings
ROOT = Path(__file__).parents[1]


def batches(A, B, seed=0):
    inputs, targets = random_batch(TINY, A * B, seed)
    targets[0, :9] = -1  # uneven counts
    return inputs.reshape(A, B, -1), targets.reshape(A, B, -1)


def test_decay_reaches_matrices_only():
    """A huge eps makes the effect of the gradient negligible, so that a step is the decay alone: p - lr * wd * p."""
    settings = dataclasses.replace(SETTINGS, weight_decay=0.5, eps=1e6)
    trainer = Trainer(TINY, settings)
    before = {n: np.asarray(p.get_value()) for n, p in gpt_jax.weights.parameters(trainer.model).items()}
    trainer.train_step(batches(1, 2), 0.1, 0)
    after = {n: np.asarray(p.get_value()) for n, p in gpt_jax.weights.parameters(trainer.model).items()}
    for row in rows(TINY):
        factor = 0.95 if row.decayed else 1.0
        result = compare(row.flax, after[row.flax], before[row.flax] * factor, 1e-6)
        assert result.ok, str(result)
        assert row.decayed == ("weight" in row.huggingface and "ln_" not in row.huggingface)


def test_clip_and_adam_by_hand():
    """One step computed from the gradient: clipping, bias-corrected moments, weight decay and learning rate."""
    settings = dataclasses.replace(SETTINGS, clip=0.01)
    trainer = Trainer(TINY, settings)
    inputs, targets = batches(1, 2)
    model = gpt_jax.GPTModel(TINY, seed=settings.seed)
    gradient = jax.grad(gpt_jax.loss.calc_loss)(model, inputs[0], targets[0])
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    metrics = trainer.train_step((inputs, targets), 0.01, 0)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert norm > settings.clip
    decayed = {row.flax for row in rows(TINY) if row.decayed}
    parts = (gpt_jax.weights.parameters(m) for m in (model, gradient, trainer.model))
    before, grads, after = ({n: np.asarray(p.get_value(), np.float64) for n, p in part.items()} for part in parts)
    for name, g in grads.items():
        g = g * settings.clip / norm
        update = g / (np.abs(g) + settings.eps) + (settings.weight_decay * before[name] if name in decayed else 0)
        # Compare updates, not parameters. Where g is close to its rounding error, its sign is unknown.
        clear = np.abs(g) > 1e-3 * np.abs(g).max()
        result = compare(name, ((before[name] - after[name]) / 0.01)[clear], update[clear], 2e-4)
        assert result.ok, str(result)


def test_state_is_donated_and_no_batch_compiles_again():
    trainer = Trainer(TINY, SETTINGS)
    old = trainer.model
    trainer.train_step(batches(1, 2), 1e-3, 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for step in range(1, 4):
        trainer.train_step(batches(1, 2, seed=step), 1e-3 * step, step)
    assert trainer._train_step._cache_size() == 1


@pytest.mark.optimized
def test_a_step_copies_no_moments():
    """On a CPU, XLA copies the old moments if the update is computed from them."""
    trainer = Trainer(TINY, dataclasses.replace(SETTINGS, batch_size=2))
    batch = trainer.to_device(*batches(1, 2))
    program = trainer._train_step.lower(trainer.state, batch, jnp.float32(1e-3), jnp.int32(0)).compile().as_text()
    assert "_mu_" in program
    assert "_nu_" in program
    assert not re.findall(r"copy\(%state_opt_state\S+(?:mu|nu)_", program)


def test_a_step_waits_for_nothing_and_moves_nothing(monkeypatch):
    """Between to_device() and the reading of the metrics, nothing is copied implicitly and nothing is waited for.

    On a CPU, JAX's transfer guard sees only copies to the device, so reads are detected by patching the array class.
    """
    trainer = Trainer(dataclasses.replace(TINY, drop_rate=0.1), SETTINGS)
    on_device = [trainer.to_device(*batches(1, 2, seed=step)) for step in range(4)]
    trainer.train_step(on_device[0], 1e-3, 0)
    read = []
    array = type(on_device[0][0])
    for name in ("_value", "__array__", "__float__", "__bool__", "block_until_ready"):
        monkeypatch.setattr(array, name, property(lambda self, name=name: read.append(name)))
    with jax.transfer_guard("disallow"):
        metrics = [trainer.train_step(on_device[step], 1e-3 * step, step) for step in range(1, 4)]
    assert not read
    with pytest.raises(TypeError):
        float(metrics[-1]["loss"])
    assert read
    monkeypatch.undo()
    assert all(np.isfinite(float(m["loss"])) for m in metrics)
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
        trainer._train_step(trainer.state, on_device[0], np.float32(1e-3), np.int32(0))


def test_dropout_is_a_function_of_seed_and_step():
    config = dataclasses.replace(TINY, drop_rate=0.3)
    inputs, targets = batches(1, 2)
    losses = [
        float(Trainer(config, dataclasses.replace(SETTINGS, seed=0)).train_step((inputs, targets), 1e-3, step)["loss"])
        for step in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    trainer = Trainer(config, SETTINGS)
    batch = inputs[0], targets[0]
    assert float(trainer.evaluate_batch(batch)) == float(trainer.evaluate_batch(batch))
    model = gpt_jax.GPTModel(config)
    dropped = np.asarray(gpt_jax.arrays.dropout(jnp.ones((200, 200)), 0.3, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.7)}
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    keys = (model(inputs[0], jax.random.key(k)) for k in (1, 1, 2))
    a, b, c = map(np.asarray, keys)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_bfloat16_keeps_float32_parameters():
    trainer = Trainer(TINY, dataclasses.replace(SETTINGS, dtype="bfloat16"))
    exact = Trainer(TINY, SETTINGS)
    for step in range(5):
        a, b = (t.train_step(batches(1, 4, seed=step), 1e-3, step) for t in (trainer, exact))
    assert float(a["loss"]) != float(b["loss"])
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=5e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.model)} == {jnp.dtype("float32")}


def test_loss_leaves_out_padding():
    inputs, targets = (part[0] for part in batches(1, 2))
    model = gpt_jax.GPTModel(TINY)
    left_out = np.where(np.arange(24) < 12, targets, -1)
    half = float(summed_loss(model, inputs[:, :12], targets[:, :12]))
    assert float(summed_loss(model, inputs, left_out)) == pytest.approx(half, rel=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast(model, jnp.bfloat16))} == {jnp.dtype("bfloat16")}
