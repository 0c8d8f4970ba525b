"""gpt_jax as a backend of comparisons: the functions of parity.comparison.protocol.Backend."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.activations import run_with_cache
from gpt_jax.decoding import DecodingModel, for_decoding
from gpt_jax.devices import choose_device
from gpt_jax.generate import generate as generate_rows
from gpt_jax.loss import calc_loss
from gpt_jax.model import GPTModel, cast
from gpt_jax.train import Trainer
from gpt_jax.weights import export_weights, load_weights
from parity.comparison.protocol import DEFAULT_COMPUTE, Batch, Compute, Weights, train_steps
from parity.config import GPTConfig
from parity.taps import select
from parity.training.settings import TrainSettings


def build(config: GPTConfig, weights: Weights, compute: Compute = DEFAULT_COMPUTE) -> GPTModel:
    """Make a model with these weights, in the dtype of `compute`; float64 needs jax.enable_x64."""
    model = cast(GPTModel(config, seed=None), compute.dtype_for(weights))
    load_weights(model, weights)
    return model


@contextlib.contextmanager
def computing(compute: Compute) -> Iterator[None]:
    """Within this context, compute on the device and in the precision of `compute`, with float64 enabled."""
    device = choose_device(compute.device)
    precision = None if compute.precision == "default" else compute.precision
    with jax.default_device(device), jax.enable_x64(True), jax.default_matmul_precision(precision):
        yield


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Compute = DEFAULT_COMPUTE) -> np.ndarray:
    with computing(compute):
        return np.asarray(jax.jit(GPTModel.__call__)(build(config, weights, compute), jnp.asarray(tokens)))


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> dict[str, np.ndarray]:
    with computing(compute):
        selected = select(names, config)
        run = jax.jit(functools.partial(run_with_cache, names=selected))
        _, cache = run(build(config, weights, compute), jnp.asarray(tokens))
        return {name: np.asarray(cache[name]) for name in selected}


def run_model(
    model: GPTModel, tokens: np.ndarray, names: Iterable[str] = (), patches: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run an existing model on tokens int [B, T], in full precision: run_with_cache from and to NumPy arrays.

    Results have at least float32.

    Returns:
        (logits [B, T, V], {name: activation}).
    """

    def as_numpy(x: Array) -> np.ndarray:
        return np.asarray(x, np.promote_types(x.dtype, np.float32))

    with jax.default_matmul_precision("highest"):
        logits, cache = run_with_cache(model, jnp.asarray(tokens), names, patches)
        return as_numpy(logits), {name: as_numpy(activation) for name, activation in cache.items()}


def cached_logits(
    config: GPTConfig, weights: Weights, tokens: np.ndarray, start: int, compute: Compute = DEFAULT_COMPUTE
) -> np.ndarray:
    with computing(compute):
        model, ids = for_decoding(build(config, weights, compute)), jnp.asarray(tokens)
        cache, pad_lengths = model.new_cache(*ids.shape), jnp.zeros(len(ids), jnp.int32)
        decode = jax.jit(DecodingModel.decode)
        row, cache = decode(model, ids[:, : start + 1], cache, 0, pad_lengths)  # [B, V]
        rows = [row]
        for slot in range(start + 1, ids.shape[1]):
            row, cache = decode(model, ids[:, slot : slot + 1], cache, slot, pad_lengths)
            rows.append(row)
        return np.asarray(jnp.stack(rows, axis=1))


def generate(
    config: GPTConfig, weights: Weights, prompts: Sequence[Sequence[int]], compute: Compute, **options: Any
) -> list[list[int]]:
    with computing(compute):
        return generate_rows(build(config, weights, compute), prompts, **options)


def loss_and_gradients(
    config: GPTConfig,
    weights: Weights,
    inputs: np.ndarray,
    targets: np.ndarray,
    compute: Compute = DEFAULT_COMPUTE,
) -> tuple[float, dict[str, np.ndarray]]:
    with computing(compute):
        model = build(config, weights, compute)
        loss, gradients = jax.jit(jax.value_and_grad(calc_loss))(model, jnp.asarray(inputs), jnp.asarray(targets))
        return float(loss), export_weights(gradients)


def train(
    config: GPTConfig,
    weights: Weights,
    settings: TrainSettings,
    batches: Iterable[Batch],
    after_step: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> list[tuple[float, float]]:
    with jax.enable_x64(settings.dtype == "float64"), jax.default_matmul_precision("highest"):
        trainer = Trainer(config, settings)
        load_weights(trainer.model, weights)
        return train_steps(trainer, lambda: export_weights(trainer.model), batches, after_step)
