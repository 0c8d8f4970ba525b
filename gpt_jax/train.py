"""Training in JAX: the state of a run, sharded over a mesh, saved and restored. gpt_torch/train.py is its twin.

train_step.py has the step.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import tree_utils as otu

from gpt_jax import checkpoint, sharding
from gpt_jax.arrays import widened
from gpt_jax.classifier import add_classifier, label_objective, save_classifier
from gpt_jax.generate import generate
from gpt_jax.lora import add_lora, save_adapter
from gpt_jax.loss import summed_loss, tiling_for
from gpt_jax.model import GPTModel, cast
from gpt_jax.pretrained import save_weights
from gpt_jax.train_step import TrainState, make_optimizer, make_train_step, with_compute_dtype
from gpt_jax.trainable import join, parameter_name, split
from gpt_jax.weights import copy_arrays, load_weights
from parity.config import GPTConfig
from parity.errors import InputError
from parity.training import optimizer_state
from parity.training.initial import Base, base_of, check_base, check_classifier, initial_arrays
from parity.training.objective import Objective
from parity.training.settings import TrainSettings
from parity.weights import Row, rows
from parity.weights.adapters import LoraConfig, adapter_rows
from parity.weights.classifier import ClassifierConfig, head_rows


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
        lora: Train adapters with these options, and nothing else. Checkpoints then hold the adapters alone, so a run
            that is resumed needs `init_from` as well.
        table: The rows of the parameters to train (parity/weights/table.py), by default all; a row that is limited to
            some layers trains those alone.
        objective: What to minimize; by default the cross-entropy of the next token, or of the label of a classifier.
        classifier: Train a classifier with these options: the model gets a new head, which is trained as well.

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
        lora: LoraConfig | None = None,
        table: Sequence[Row] | None = None,
        objective: Objective | None = None,
        classifier: ClassifierConfig | None = None,
    ):
        self.config, self.settings, self._mesh = config, settings, mesh
        compute_dtype = jnp.dtype(settings.dtype)
        if compute_dtype == jnp.float64 and jnp.zeros(()).dtype != jnp.float64:
            raise InputError("dtype float64 needs jax_enable_x64")
        self._param_dtype = widened(compute_dtype)
        self.lora, self.classifier = lora, classifier
        initial = initial_arrays(config, settings, init_from)
        self.base = Base() if lora is None else base_of(config, initial, init_from)
        model = GPTModel(config, None, attention, unroll, remat)
        load_weights(model, *initial)
        del initial
        if lora is not None:
            add_lora(model, lora, settings.seed)
        own: list[Row] = []
        if classifier is not None:
            add_classifier(model, classifier, settings.seed)
            self.config, own = model.config, head_rows(classifier)
        model = cast(model, self._param_dtype)
        self.stored: Sequence[Row] = [*(rows(self.config) if lora is None else adapter_rows(lora)), *own]
        self.trainable: Sequence[Row] = self.stored if table is None else [*table, *own]
        self._frozen: GPTModel | None = None
        if lora is not None or table is not None:
            model, self._frozen = split(model, self.trainable)
        self.optimizer = make_optimizer(model, settings, self.trainable)
        self._state_sharding = self._frozen_sharding = replicated = out_shardings = None
        if mesh is None:
            self.state = TrainState(model, self.optimizer.init(model))
        else:
            state = jax.eval_shape(lambda: TrainState(model, self.optimizer.init(model)))
            table = [*rows(self.config), *self.trainable]
            self._state_sharding = sharding.shardings(state, config, mesh, parameter_name, table)
            replicated = NamedSharding(mesh, PartitionSpec())
            out_shardings = (self._state_sharding, replicated)
            model = sharding.device_put_tree(model, self._state_sharding.model)
            if self._frozen is not None:
                self._frozen_sharding = sharding.shardings(self._frozen, config, mesh, parameter_name, table)
                self._frozen = sharding.device_put_tree(self._frozen, self._frozen_sharding)
            # The moments are created sharded: no device ever holds all of them.
            self.state = TrainState(
                model, jax.jit(self.optimizer.init, out_shardings=self._state_sharding.opt_state)(model)
            )
        dropout_seed = settings.seed if config.drop_rate or (lora is not None and lora.dropout) else None
        [device, *_] = jax.tree.leaves(self.state)[0].devices()
        tiling = tiling_for(device.platform)
        default = Objective(summed_loss) if classifier is None else label_objective(classifier)
        self._objective = default if objective is None else objective
        self._train_step = make_train_step(
            self.optimizer,
            settings.clip,
            compute_dtype,
            dropout_seed,
            mesh,
            out_shardings,
            tiling,
            self.trainable,
            self._objective,
        )

        def evaluation(function: Callable[..., Array]) -> Callable[..., Array]:
            compute = with_compute_dtype(function, compute_dtype, mesh, tiling)

            def evaluate(model: GPTModel, frozen: GPTModel | None, batch: tuple[Array, ...]) -> Array:
                return compute(join(model, frozen, self.trainable), batch)

            return jax.jit(evaluate, out_shardings=replicated)

        self._summed_loss = evaluation(self._objective.summed_loss)
        self._rows = None if self._objective.rows is None else evaluation(self._objective.rows)

    @property
    def model(self) -> GPTModel:
        return join(self.state.model, self._frozen, self.trainable)

    def local_slice(self, size: int) -> slice:
        return slice(0, size) if self._mesh is None else sharding.local_rows(size, self._mesh)

    def to_device(self, inputs: np.ndarray, targets: np.ndarray, *more: np.ndarray) -> tuple[Array, ...]:
        self._objective.check_batch(self.config, inputs, targets)
        by_rows = [None] * (inputs.ndim - 2) + [sharding.BATCH]

        def copy(array: np.ndarray) -> Array:
            is_float = np.issubdtype(array.dtype, np.floating)
            return self._to_mesh(array.astype(self._param_dtype) if is_float else array, *by_rows)

        return tuple(map(copy, (inputs, targets, *more)))

    def train_step(self, batch: Sequence[Array], lr: float, step: int) -> dict[str, Array]:
        numbers = self._to_mesh(np.asarray(lr, self._param_dtype)), self._to_mesh(np.asarray(step, np.int32))
        self.state, metrics = self._train_step(self.state, tuple(batch), *numbers, self._frozen)
        return self._block_on_cpu(metrics)

    def evaluate_batch(self, batch: Sequence[Array]) -> Array:
        return self._block_on_cpu(self._summed_loss(self.state.model, self._frozen, tuple(batch)))

    def evaluate_rows(self, batch: Sequence[Array]) -> np.ndarray:
        assert self._rows is not None, "the objective has no rows"
        return np.asarray(self._rows(self.state.model, self._frozen, tuple(batch)))

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
        model = self._gathered(self.state.model if self.lora else self.model)
        checkpoint.save(folder, model, _to_arrays(self.state), self._save_model)

    def _save_model(self, model: GPTModel, folder: Path) -> None:
        if self.classifier is not None:
            save_classifier(model, folder, *self.base)
        elif self.lora is None:
            save_weights(model, folder)
        else:
            save_adapter(model, folder, *self.base)

    def restore(self, folder: Path) -> None:
        arrays = _to_arrays(self.state)
        check_classifier(folder, self.classifier)
        if self.lora is not None:
            check_base(folder, self.lora, self.base)
        elif self._frozen is not None:
            self._restore_frozen(folder)
        if (folder / optimizer_state.ORBAX_FOLDER).is_dir():
            self.state = _from_arrays(self.state, checkpoint.restore(folder, arrays))
            return
        stored = optimizer_state.read(folder, self.config, self.stored, self.trainable)
        restored: dict[str, Any] = {"step": jnp.asarray(stored.step, arrays["step"].dtype)}
        for part in ("parameters", *optimizer_state.MOMENTS):
            converted = stored.converted(part, "flax", self.config)
            restored |= {f"{part}.{name}": jnp.asarray(array, self._param_dtype) for name, array in converted.items()}
        state = _from_arrays(self.state, restored)
        self.state = state if self._state_sharding is None else sharding.device_put_tree(state, self._state_sharding)

    def _restore_frozen(self, folder: Path) -> None:
        parameters = optimizer_state.read_weights(folder, self.config, self.stored)
        model = self._gathered(self.model)
        copy_arrays(model, parameters, "huggingface", str(folder), self.stored)
        _, frozen = split(model, self.trainable)
        if self._frozen_sharding is not None:
            frozen = sharding.device_put_tree(frozen, self._frozen_sharding)
        self._frozen = frozen


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
