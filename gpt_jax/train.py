"""Training in JAX: a pure, jitted, donated step on an explicit state."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gpt_jax import checkpoint
from gpt_jax.generate import generate
from gpt_jax.model import GPTModel, cast
from parity.config import GPTConfig
from parity.data import NO_TARGET
from parity.settings import TrainSettings
from parity.weights import rows


class TrainState(NamedTuple):
    model: GPTModel  # float32 parameters
    opt_state: optax.OptState


def loss_sum(model: GPTModel, inputs: Array, targets: Array, key: Array | None = None) -> Array:
    """Cross-entropy in nats, summed over the targets [B, T] that are not NO_TARGET."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs, key), jnp.maximum(targets, 0))
    return jnp.where(targets == NO_TARGET, 0, losses).sum()


def calc_loss(model: GPTModel, inputs: Array, targets: Array, key: Array | None = None) -> Array:
    """Cross-entropy in nats, the mean over the targets [B, T] that are not NO_TARGET."""
    return loss_sum(model, inputs, targets, key) / (targets != NO_TARGET).sum()


def make_optimizer(settings: TrainSettings, config: GPTConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) behind a global-norm clip, up to the learning rate."""
    decayed = {row.flax for row in rows(config) if row.decayed}

    def mask(model: GPTModel) -> GPTModel:
        # The table decides, not the rank: stacking gives biases a second axis.
        return jax.tree_util.tree_map_with_path(lambda path, _: _name(path).removesuffix(".value") in decayed, model)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask),
    )


def _name(path: tuple) -> str:
    """`trf_blocks.norm1.scale.value`, say: the table's flax name is in it."""
    return jax.tree_util.keystr(path).strip(".")


def make_train_step(optimizer: optax.GradientTransformation, dtype: Any):
    """train_step(state, inputs [A, B, T], targets, lr, key) -> (state, {loss, grad_norm}), jitted, state donated."""

    def one_sum(model, inputs, targets, key):
        return loss_sum(cast(model, dtype), inputs, targets, key)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, inputs: Array, targets: Array, lr: Array, key: Array | None):
        A = inputs.shape[0]
        keys = None if key is None else jax.random.split(key, A)

        def micro_batch(total, batch):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(one_sum)(state.model, *batch)), None

        if A == 1:
            total = jax.value_and_grad(one_sum)(state.model, inputs[0], targets[0], None if keys is None else keys[0])
        else:
            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.model))
            total, _ = jax.lax.scan(micro_batch, zeros, (inputs, targets, keys))
        loss, grads = jax.tree.map(lambda a: a / (targets != NO_TARGET).sum(), total)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = jax.tree.map(lambda p, u: p - lr * u, state.model, updates)
        return TrainState(model, opt_state), {"loss": loss, "grad_norm": optax.global_norm(grads)}

    return train_step


class Trainer:
    """A model with its optimizer, as parity/fit.py drives it."""

    def __init__(self, config: GPTConfig, settings: TrainSettings, attention: str = "explicit", unroll: int = 1):
        self.config = config
        self._optimizer = make_optimizer(settings, config)
        model = GPTModel(config, seed=settings.seed, attention=attention, unroll=unroll)
        self.state = TrainState(model, self._optimizer.init(model))
        self._dropout = jax.random.key(settings.seed) if config.drop_rate else None
        self._dtype = jnp.dtype(settings.dtype)
        self._train_step = make_train_step(self._optimizer, self._dtype)
        self._loss_sum = jax.jit(lambda model, *batch: loss_sum(cast(model, self._dtype), *batch))

    def train_step(self, inputs: np.ndarray, targets: np.ndarray, lr: float, step: int) -> dict[str, Array]:
        key = None if self._dropout is None else jax.random.fold_in(self._dropout, step)
        self.state, metrics = self._train_step(self.state, inputs, targets, np.float32(lr), key)
        return metrics

    def loss_sum(self, inputs: np.ndarray, targets: np.ndarray) -> Array:
        return self._loss_sum(self.state.model, inputs, targets)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        top_k = min(50, self.config.n_vocab)
        return generate(self.state.model, prompts, max_new_tokens, temperature=0.8, top_k=top_k, seed=seed)

    def save(self, folder: Path) -> None:
        checkpoint.save(folder, self.state.model, self._arrays())

    def restore(self, folder: Path) -> None:
        arrays = checkpoint.restore(folder, self._arrays())
        self.state = jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], self.state)

    def _arrays(self) -> dict[str, Array]:
        return {_name(path): array for path, array in jax.tree_util.tree_leaves_with_path(self.state)}
