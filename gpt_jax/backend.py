"""gpt_jax as parity/backend.py asks for it."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model import GPTModel, cast
from gpt_jax.pretrained import export_weights, load_weights
from gpt_jax.train import Trainer, calc_loss
from parity.backend import Batch, Weights
from parity.config import GPTConfig
from parity.settings import TrainSettings


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


def train(
    config: GPTConfig,
    weights: Weights,
    settings: TrainSettings,
    batches: Iterable[Batch],
    after: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> list[tuple[float, float]]:
    with jax.enable_x64(settings.dtype == "float64"), jax.default_matmul_precision("highest"):
        trainer = Trainer(config, settings)
        load_weights(trainer.state.model, weights)
        metrics = []
        for step, (inputs, targets, lr) in enumerate(batches):
            found = trainer.train_step(*trainer.put(inputs, targets), lr, step)
            metrics.append((float(found["loss"]), float(found["grad_norm"])))
            if after is not None:
                after(export_weights(trainer.state.model))
        return metrics
