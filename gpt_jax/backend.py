"""gpt_jax as parity/backend.py asks for it."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model import GPTModel, cast
from gpt_jax.pretrained import export_weights, load_weights
from gpt_jax.train import calc_loss
from parity.backend import Weights
from parity.config import GPTConfig


def build(config: GPTConfig, weights: Weights) -> GPTModel:
    """A model with these weights, in their dtype; float64 needs jax.enable_x64."""
    model = cast(GPTModel(config, seed=None), next(iter(weights.values())).dtype)
    load_weights(model, weights)
    return model


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        model = build(config, weights)
        return np.asarray(jax.jit(GPTModel.__call__)(model, jnp.asarray(tokens)))


def loss_and_gradients(
    config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        model = build(config, weights)
        loss, gradients = jax.jit(jax.value_and_grad(calc_loss))(model, jnp.asarray(inputs), jnp.asarray(targets))
        return float(loss), export_weights(gradients)
