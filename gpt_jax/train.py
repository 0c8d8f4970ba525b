"""Training in JAX with optax: a pure, jitted step on an explicit, donated state. gpt_torch/train.py is its twin."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import tree_utils as otu

from gpt_jax import checkpoint, sharding
from gpt_jax.arrays import widened
from gpt_jax.generate import generate
from gpt_jax.loss import CPU_TILING, Tiling, summed_loss, tiling_for
from gpt_jax.model import GPTModel, cast
from gpt_jax.weights import load_weights
from parity.config import GPTConfig, is_counted
from parity.errors import InputError
from parity.training import optimizer_state
from parity.training.initial import initial_arrays
from parity.training.settings import TrainSettings
from parity.weights import rows


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    model: GPTModel
    """The model, with parameters in float32 or float64."""
    opt_state: optax.OptState
    """AdamW's count and moments."""


def make_summed_loss(compute_dtype: Any, mesh: Mesh | None = None, tiling: Tiling = CPU_TILING):
    """Return summed_loss() in `compute_dtype`, with activations sharded over `mesh`, for jax.jit and jax.grad."""

    def cast_and_sum(model: GPTModel, inputs: Array, targets: Array, key: Array | None = None) -> Array:
        with sharding.shard_activations(mesh):
            return summed_loss(cast(model, compute_dtype), inputs, targets, key, tiling, mesh)

    return cast_and_sum


def make_optimizer(model: GPTModel, settings: TrainSettings) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) without the learning rate, by which each step multiplies the update."""
    decayed = {row.flax for row in rows(model.config) if row.decayed}

    def mask(model: GPTModel) -> GPTModel:
        # The table decides, not the number of axes: stacked biases have two.
        return jax.tree_util.tree_map_with_path(lambda path, _: parameter_name(path) in decayed, model)

    return optax.chain(
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask),
    )


def parameter_name(path: tuple) -> str:
    """Return the name of a leaf in the flax column of the weight table, for example `trf_blocks.norm1.scale`."""
    return jax.tree_util.keystr(path).strip(".").removesuffix(".value")


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
    optimizer: optax.GradientTransformation,
    clip: float,
    compute_dtype: Any,
    dropout_seed: int | None = None,
    mesh: Mesh | None = None,
    out_shardings: Any = None,
    tiling: Tiling = CPU_TILING,
):
    """Return the jitted train_step(state, inputs [A, B, T], targets, lr, step) -> (state, {loss, grad_norm}).

    Args:
        optimizer: AdamW without the learning rate, from make_optimizer().
        clip: Largest global norm of the gradient.
        compute_dtype: Dtype of the computation.
        dropout_seed: Dropout is a function of this seed and the step; None turns it off.
        mesh: Devices over which activations are sharded.
        out_shardings: Shardings of the returned state and metrics.
        tiling: Size of the loss's chunks on the devices that the step is for; see tiling_for().

    Returns:
        The step, which donates its state. A step whose loss or gradient is not finite changes nothing.
    """

    loss_and_grads = jax.value_and_grad(make_summed_loss(compute_dtype, mesh, tiling))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def train_step(state: TrainState, inputs: Array, targets: Array, lr: Array, step: Array):
        A = inputs.shape[0]
        keys = None
        if dropout_seed is not None:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(dropout_seed), step), A)

        def micro_batch(total, batch):
            return jax.tree.map(jnp.add, total, loss_and_grads(state.model, *batch)), None

        if A == 1:
            total = loss_and_grads(state.model, inputs[0], targets[0], None if keys is None else keys[0])
        else:
            zeros = (jnp.zeros((), widened(compute_dtype)), jax.tree.map(jnp.zeros_like, state.model))
            total, _ = jax.lax.scan(micro_batch, zeros, (inputs, targets, keys))
        loss, grads = jax.tree.map(lambda a: a / is_counted(targets).sum(dtype=a.dtype), total)
        grads, norm = clip_by_global_norm(grads, clip)
        with jax.numpy_dtype_promotion("standard"):  # optax does not run in the strict mode
            updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = jax.tree.map(lambda p, u: p - lr * u, state.model, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)  # otherwise the step is skipped
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), TrainState(model, opt_state), state)
        return state, {"loss": loss, "grad_norm": norm}

    return train_step


class Trainer:
    """A model with its optimizer; implements parity.training.trainer.Trainer, which documents the methods.

    Args:
        config: Shape of the model.
        settings: Settings of the run.
        init_from: Weights to start from (see parity.training.initial.weights_folder); by default random weights that
            depend on the settings' seed.
        attention: "explicit", the formula as written in the model, or "cudnn", cuDNN's fused kernel.
        unroll: Number of layers per iteration of the compiled loop over layers.
        mesh: Devices over which the model and the batches are sharded (gpt_jax/sharding.py).
        remat: What the backward pass recomputes: "none", "products" or "all" (see GPTModel).

    Raises:
        InputError: For dtype float64 without jax_enable_x64.
    """

    def __init__(
        self,
        config: GPTConfig,
        settings: TrainSettings,
        init_from: str | Path | None = None,
        attention: str = "explicit",
        unroll: int = 1,
        mesh: Mesh | None = None,
        remat: str = "none",
    ):
        self.config, self.settings, self._mesh = config, settings, mesh
        compute_dtype = jnp.dtype(settings.dtype)
        if compute_dtype == jnp.float64 and jnp.zeros(()).dtype != jnp.float64:
            raise InputError("dtype float64 needs jax_enable_x64")
        self._param_dtype = widened(compute_dtype)
        model = GPTModel(config, None, attention, unroll, remat)
        load_weights(model, *initial_arrays(config, settings, init_from))
        model = cast(model, self._param_dtype)
        self.optimizer = make_optimizer(model, settings)
        self._state_sharding = replicated = out_shardings = None
        if mesh is None:
            self.state = TrainState(model, self.optimizer.init(model))
        else:
            state = jax.eval_shape(lambda: TrainState(model, self.optimizer.init(model)))
            self._state_sharding = sharding.shardings(state, config, mesh, parameter_name)
            replicated = NamedSharding(mesh, PartitionSpec())
            out_shardings = (self._state_sharding, replicated)
            model = sharding.device_put_tree(model, self._state_sharding.model)
            # The moments are created sharded: no device ever holds all of them.
            self.state = TrainState(
                model, jax.jit(self.optimizer.init, out_shardings=self._state_sharding.opt_state)(model)
            )
        dropout_seed = settings.seed if config.drop_rate else None
        [device, *_] = jax.tree.leaves(self.state)[0].devices()
        tiling = tiling_for(device.platform)
        self._train_step = make_train_step(
            self.optimizer, settings.clip, compute_dtype, dropout_seed, mesh, out_shardings, tiling
        )
        self._summed_loss = jax.jit(make_summed_loss(compute_dtype, mesh, tiling), out_shardings=replicated)

    @property
    def model(self) -> GPTModel:
        return self.state.model

    def local_slice(self, size: int) -> slice:
        return slice(0, size) if self._mesh is None else sharding.local_rows(size, self._mesh)

    def to_device(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[Array, Array]:
        self.config.check_targets(targets)
        by_rows = [None] * (inputs.ndim - 2) + [sharding.BATCH]
        return self._to_mesh(inputs, *by_rows), self._to_mesh(targets, *by_rows)

    def train_step(self, inputs: Array, targets: Array, lr: float, step: int) -> dict[str, Array]:
        numbers = self._to_mesh(np.asarray(lr, self._param_dtype)), self._to_mesh(np.asarray(step, np.int32))
        self.state, metrics = self._train_step(self.state, inputs, targets, *numbers)
        return self._block_on_cpu(metrics)

    def evaluate_batch(self, inputs: Array, targets: Array) -> Array:
        return self._block_on_cpu(self._summed_loss(self.model, inputs, targets))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        return generate(self._gathered(self.model), prompts, max_new_tokens, **options)

    def _to_mesh(self, array: np.ndarray, *spec: Any) -> Array:
        """Copy this process's part of an array to its devices, sharded over the mesh as `spec` says."""
        if self._mesh is None:
            return jax.device_put(array)
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, PartitionSpec(*spec)), array)

    def _gathered(self, model: GPTModel) -> GPTModel:
        return model if self._mesh is None else sharding.gather(model, self._mesh)

    def _block_on_cpu(self, result: Any) -> Any:
        """Wait for a result on a mesh of CPU devices, whose concurrent programs share threads and can deadlock."""
        may_deadlock = self._mesh is not None and self._mesh.devices.flat[0].platform == "cpu"
        return jax.block_until_ready(result) if may_deadlock else result

    def save(self, folder: Path) -> None:
        checkpoint.save(folder, self._gathered(self.model), _to_arrays(self.state))

    def restore(self, folder: Path) -> None:
        arrays = _to_arrays(self.state)
        if (folder / optimizer_state.ORBAX_FOLDER).is_dir():
            self.state = _from_arrays(self.state, checkpoint.restore(folder, arrays))
            return
        stored = optimizer_state.read(folder, self.config)
        restored: dict[str, Any] = {"step": jnp.asarray(stored.step, arrays["step"].dtype)}
        for part in ("parameters", *optimizer_state.MOMENTS):
            converted = stored.converted(part, "flax", self.config)
            restored |= {f"{part}.{name}": jnp.asarray(array, self._param_dtype) for name, array in converted.items()}
        state = _from_arrays(self.state, restored)
        self.state = state if self._state_sharding is None else sharding.device_put_tree(state, self._state_sharding)


def _to_arrays(state: TrainState) -> dict[str, Array]:
    """Return {"step", "parameters.NAME", "exp_avg.NAME", "exp_avg_sq.NAME": array}; NAME is the table's flax name."""
    arrays: dict[str, Array] = {"step": otu.tree_get(state.opt_state, "count")}
    for part, tree in _parts(state).items():
        arrays |= {f"{part}.{parameter_name(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return arrays


def _from_arrays(state: TrainState, arrays: dict[str, Array]) -> TrainState:
    parts = {
        part: jax.tree_util.tree_map_with_path(
            lambda path, _, part=part: arrays[f"{part}.{parameter_name(path)}"], tree
        )
        for part, tree in _parts(state).items()
    }
    opt_state = otu.tree_set(state.opt_state, count=arrays["step"], mu=parts["exp_avg"], nu=parts["exp_avg_sq"])
    return TrainState(parts["parameters"], opt_state)


def _parts(state: TrainState) -> dict[str, GPTModel]:
    moments = (otu.tree_get(state.opt_state, name) for name in ("mu", "nu"))
    return dict(zip(("parameters", *optimizer_state.MOMENTS), (state.model, *moments), strict=True))
