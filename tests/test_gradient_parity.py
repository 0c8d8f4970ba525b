"""The loss and every gradient agree: torch with JAX, and both with the complex step of the NumPy reference."""

import dataclasses

import numpy as np
import pytest
from support import numpy_oracle as oracle
from support.models import BACKENDS, CONFIGS, TINY, probing_weights, random_batch
from support.tolerances import GRADIENT_RTOL, LOSS_RTOL

from parity.comparison.compare import compare
from parity.config import IGNORE_INDEX
from parity.errors import InputError
from parity.weights import shapes

pytestmark = pytest.mark.optimized  # as users' programs are compiled


@pytest.mark.parametrize("dtype", GRADIENT_RTOL)
def test_loss_and_gradients(config, dtype):
    weights = {name: w.astype(dtype) for name, w in probing_weights(config).items()}
    inputs, targets = random_batch(config)
    loss, gradients = BACKENDS["torch"].loss_and_gradients(config, weights, inputs, targets)
    loss_jax, gradients_jax = BACKENDS["jax"].loss_and_gradients(config, weights, inputs, targets)
    expected = oracle.loss(config, {n: w.astype(np.float64) for n, w in weights.items()}, inputs, targets)
    for got in (loss, loss_jax):
        result = compare("loss", got, expected, 0, LOSS_RTOL[dtype])
        assert result.ok, str(result)
    assert gradients.keys() == gradients_jax.keys() == shapes(config, "huggingface").keys()
    for name, gradient in gradients.items():
        assert gradients_jax[name].dtype == gradient.dtype == dtype
        result = compare(name, gradients_jax[name], gradient, GRADIENT_RTOL[dtype] * np.abs(gradient).max())
        assert result.ok, str(result)


def test_gradients_against_complex_step(backend, config):
    weights = probing_weights(config)
    inputs, targets = random_batch(config)
    _, gradients = backend.loss_and_gradients(config, weights, inputs, targets)
    generator = np.random.default_rng(2)
    for name, gradient in gradients.items():
        direction = generator.normal(size=gradient.shape)
        expected = oracle.directional_derivative(config, weights, inputs, targets, name, direction)
        size = np.abs(gradient).max() * np.sqrt(gradient.size)
        result = compare(name, (gradient * direction).sum(), expected, 1e-12 * size)
        assert result.ok, str(result)


def test_tied_head_sums_both_gradients(backend):
    """The gradient of a tied tok_emb is the sum of those of the embedding and of the head."""
    tied = CONFIGS["gpt2"]
    untied = dataclasses.replace(tied, tied_head=False)
    weights = probing_weights(tied)
    inputs, targets = random_batch(tied)
    _, got = backend.loss_and_gradients(tied, weights, inputs, targets)
    _, parts = backend.loss_and_gradients(untied, {**weights, "lm_head.weight": weights["wte.weight"]}, inputs, targets)
    result = compare("wte", got["wte.weight"], parts["wte.weight"] + parts["lm_head.weight"], 1e-12)
    assert result.ok, str(result)


def test_reference_ignores_two_targets_and_refuses_others():
    weights, (inputs, targets) = probing_weights(TINY), random_batch(TINY)
    loss = oracle.loss(TINY, weights, inputs, targets)
    assert oracle.loss(TINY, weights, inputs, np.where(targets == IGNORE_INDEX, -100, targets)) == loss
    counted = np.where(targets == IGNORE_INDEX, 0, targets)
    assert oracle.loss(TINY, weights, inputs, counted) != loss
    for bad in (-2, TINY.n_vocab):
        with pytest.raises(InputError, match=f"target {bad} is outside the vocabulary"):
            oracle.loss(TINY, weights, inputs, np.where(targets == IGNORE_INDEX, bad, targets))
