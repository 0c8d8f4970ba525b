"""gpt_jax as parity/backend.py asks for it."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.activations import run_with_cache
from gpt_jax.decoding import for_decoding
from gpt_jax.devices import choose_device
from gpt_jax.generate import generate as generate_rows
from gpt_jax.loss import calc_loss
from gpt_jax.model import GPTModel, cast
from gpt_jax.train import Trainer
from gpt_jax.weights import export_weights, load_weights
from parity.comparison.protocol import FULL, Batch, Compute, Weights
from parity.config import GPTConfig
from parity.taps import select
from parity.training.settings import TrainSettings


def build(config: GPTConfig, weights: Weights, compute: Compute = FULL) -> GPTModel:
    """A model with these weights; float64 needs jax.enable_x64."""
    model = cast(GPTModel(config, seed=None), compute.of(weights))
    load_weights(model, weights)
    return model


@contextlib.contextmanager
def computing(compute: Compute) -> Iterator[None]:
    """On the device, with the precision, and with float64 where it is asked for."""
    device = choose_device(compute.device)
    precision = None if compute.precision == "default" else compute.precision
    with jax.default_device(device), jax.enable_x64(True), jax.default_matmul_precision(precision):
        yield


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Compute = FULL) -> np.ndarray:
    with computing(compute):
        return np.asarray(jax.jit(GPTModel.__call__)(build(config, weights, compute), jnp.asarray(tokens)))


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Compute = FULL,
) -> dict[str, np.ndarray]:
    with computing(compute):
        wanted = select(names, config)
        run = jax.jit(functools.partial(run_with_cache, names=wanted))
        _, cache = run(build(config, weights, compute), jnp.asarray(tokens))
        return {name: to_numpy(cache[name]) for name in wanted}


def cached_logits(
    config: GPTConfig, weights: Weights, tokens: np.ndarray, start: int, compute: Compute = FULL
) -> np.ndarray:
    with computing(compute):
        model = for_decoding(build(config, weights, compute))
        decode = jax.jit(GPTModel.decode)
        first = jnp.zeros(len(tokens), jnp.int32)
        last, cache = decode(model, jnp.asarray(tokens[:, : start + 1]), model.new_cache(*tokens.shape), 0, first)
        found = [last]
        for slot in range(start + 1, tokens.shape[1]):
            last, cache = decode(model, jnp.asarray(tokens[:, slot : slot + 1]), cache, slot, first)
            found.append(last)
        return np.stack([np.asarray(part) for part in found], axis=1)


def generate(
    config: GPTConfig, weights: Weights, prompts: Sequence[Sequence[int]], compute: Compute, **options: Any
) -> list[list[int]]:
    with computing(compute):
        return generate_rows(build(config, weights, compute), prompts, **options)


def loss_and_gradients(
    config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray, compute: Compute = FULL
) -> tuple[float, dict[str, np.ndarray]]:
    with computing(compute):
        model = build(config, weights, compute)
        loss, gradients = jax.jit(jax.value_and_grad(calc_loss))(model, jnp.asarray(inputs), jnp.asarray(targets))
        return float(loss), {name: to_numpy(array) for name, array in export_weights(gradients).items()}


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
            found = trainer.train_step(*trainer.to_device(inputs, targets), lr, step)
            metrics.append((float(found["loss"]), float(found["grad_norm"])))
            if after is not None:
                after(export_weights(trainer.state.model))
        return metrics


def to_numpy(x: Array | np.ndarray) -> np.ndarray:
    """bfloat16, which NumPy has not, as float32."""
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
