"""The jitted training step on an explicit, donated state, and its loss, optimizer and clipping."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from optax import tree_utils as otu

from gpt_jax import sharding
from gpt_jax.arrays import widened
from gpt_jax.lora import lora_config, with_dropout
from gpt_jax.loss import CPU_TILING, Tiling, summed_loss
from gpt_jax.model import GPTModel, cast
from gpt_jax.trainable import join, parameter_name
from parity.training.objective import Objective
from parity.training.settings import TrainSettings
from parity.weights import Row, rows


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    model: GPTModel
    """The model, with parameters in float32 or float64; or its trainable part, as trainable.split() returns it."""
    opt_state: optax.OptState
    """AdamW's count and moments."""


def with_compute_dtype(
    function: Callable[..., Array], compute_dtype: Any, mesh: Mesh | None = None, tiling: Tiling = CPU_TILING
):
    """Return a function of an objective in `compute_dtype`, with activations sharded over `mesh`.

    It is a function of (model, batch, key) for jax.jit and jax.grad.
    """

    def compute(model: GPTModel, batch: Sequence[Array], key: Array | None = None) -> Array:
        model = cast(model, compute_dtype)
        lora = lora_config(model)
        if key is not None and lora is not None and lora.dropout:
            key, adapter_key = jax.random.split(key)
            model = with_dropout(model, adapter_key)
        with sharding.shard_activations(mesh):
            return function(model, *batch, key=key, tiling=tiling, mesh=mesh)

    return compute


def make_optimizer(
    model: GPTModel, settings: TrainSettings, table: Sequence[Row] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW (Loshchilov & Hutter 2019) without the learning rate, by which each step multiplies the update.

    `table` has the rows of the parameters that are trained, by default all of the model's.
    """
    decayed = {row.flax for row in (rows(model.config) if table is None else table) if row.decayed}

    def mask(model: GPTModel) -> GPTModel:
        # The table decides, not the number of axes: stacked biases have two.
        return jax.tree_util.tree_map_with_path(lambda path, _: parameter_name(path) in decayed, model)

    return optax.chain(
        scale_by_adam(settings.beta1, settings.beta2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask),
    )


def scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Return optax.scale_by_adam, whose update() takes one more argument, finite: where it is false, no state changes.

    The update is computed from the moments that are stored. From optax's, which are not stored if finite is false, XLA
    for CPUs would compute it next to them, from a copy of all old moments.
    """
    adam = optax.scale_by_adam(beta1, beta2, eps)

    def update(
        gradients: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None, *, finite: Array
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        _, new = adam.update(gradients, state)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        mean = otu.tree_bias_correction(new.mu, beta1, new.count)
        square = otu.tree_bias_correction(new.nu, beta2, new.count)
        return jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + eps), mean, square), new

    return optax.GradientTransformationExtraArgs(adam.init, update)


def clip_by_global_norm(gradients: GPTModel, largest: float) -> tuple[GPTModel, Array]:
    """Return the gradients scaled to a global norm of at most `largest`, and their norm before scaling.

    Rows are summed first, as in gpt_torch. Without the barrier XLA merges both sums, which takes 1.6 s on a CPU for the
    transposed gradient of the notebook's head.
    """
    row_sums = [jnp.square(g).sum(axis=-1) for g in jax.tree.leaves(gradients)]
    norm = jnp.sqrt(sum(sums.sum() for sums in jax.lax.optimization_barrier(row_sums)))
    scale = jnp.minimum(1.0, largest / norm)  # 1 where the norm is 0
    return jax.tree.map(lambda g: g * scale, gradients), norm


def make_train_step(
    optimizer: optax.GradientTransformationExtraArgs,
    clip: float,
    compute_dtype: Any,
    dropout_seed: int | None = None,
    mesh: Mesh | None = None,
    out_shardings: Any = None,
    tiling: Tiling = CPU_TILING,
    table: Sequence[Row] = (),
    objective: Objective | None = None,
):
    """Return the jitted train_step(state, batch, lr, step) -> (state, {loss, grad_norm}).

    A batch is (inputs [A, B, T], targets, ...) with A micro-batches. If a part of the model is frozen, the state holds
    the other part, and the frozen one is the last argument.

    Args:
        optimizer: AdamW without the learning rate, from make_optimizer().
        clip: Largest global norm of the gradient.
        compute_dtype: Dtype of the computation.
        dropout_seed: Dropout is a function of this seed and the step; None turns it off.
        mesh: Devices over which activations are sharded.
        out_shardings: Shardings of the returned state and metrics.
        tiling: Size of the loss's chunks on the devices that the step is for; see tiling_for().
        table: The rows of the parameters that are trained, if a part of the model is frozen.
        objective: What to minimize; by default the cross-entropy of the next token.

    Returns:
        The step, which donates its state. A step whose loss or gradient is not finite changes nothing.
    """

    objective = objective or Objective(summed_loss)
    summed = with_compute_dtype(objective.summed_loss, compute_dtype, mesh, tiling)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def train_step(state: TrainState, batch: tuple[Array, ...], lr: Array, step: Array, frozen: GPTModel | None = None):
        @jax.value_and_grad
        def loss_and_grads(model: GPTModel, batch: tuple[Array, ...], key: Array | None) -> Array:
            return summed(join(model, frozen, table), batch, key)

        A = batch[0].shape[0]
        keys = None
        if dropout_seed is not None:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(dropout_seed), step), A)

        def micro_batch(total, batch_and_key):
            return jax.tree.map(jnp.add, total, loss_and_grads(state.model, *batch_and_key)), None

        if A == 1:
            only = tuple(array[0] for array in batch)
            total = loss_and_grads(state.model, only, None if keys is None else keys[0])
        else:
            zeros = (jnp.zeros((), widened(compute_dtype)), jax.tree.map(jnp.zeros_like, state.model))
            total, _ = jax.lax.scan(micro_batch, zeros, (batch, keys))
        count = objective.n_terms(batch[1])
        loss, grads = jax.tree.map(lambda a: a / count.astype(a.dtype), total)
        grads, norm = clip_by_global_norm(grads, clip)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)  # otherwise the step is skipped
        with jax.numpy_dtype_promotion("standard"):  # optax does not run in the strict mode
            updates, opt_state = optimizer.update(grads, state.opt_state, state.model, finite=finite)
        model = jax.tree.map(lambda p, u: jnp.where(finite, p - lr * u, p), state.model, updates)
        return TrainState(model, opt_state), {"loss": loss, "grad_norm": norm}

    return train_step
