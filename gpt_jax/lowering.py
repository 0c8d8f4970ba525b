"""The training step that Trainer runs, lowered from shapes alone: to compile it without allocating an array."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gpt_jax import sharding
from gpt_jax.arrays import widened
from gpt_jax.loss import tiling_for
from gpt_jax.model import GPTModel, cast
from gpt_jax.train_step import TrainState, make_optimizer, make_train_step
from gpt_jax.trainable import parameter_name
from parity.config import GPTConfig
from parity.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How the training step is compiled; see GPTModel."""

    attention: str = "explicit"
    unroll: int = 1
    remat: str = "none"


def lower_train_step(
    config: GPTConfig, settings: TrainSettings, options: StepOptions, devices: Mesh | jax.Device
) -> jax.stages.Lowered:
    """Lower the training step of a Trainer.

    Args:
        config: The model's configuration.
        settings: Settings of the run: batch size, micro-batches, dtype and seed.
        options: Attention, unroll and remat.
        devices: The mesh, or the single device, that the step is for. It need not exist (see gpu_targets).

    Returns:
        The lowered step; compile() compiles it.
    """
    compute_dtype = jnp.dtype(settings.dtype)
    param_dtype = widened(compute_dtype)

    def initial_state() -> TrainState:
        model = GPTModel(config, None, options.attention, options.unroll, options.remat)
        model = cast(model, param_dtype)
        return TrainState(model, make_optimizer(model, settings).init(model))

    state = jax.eval_shape(initial_state)
    mesh = devices if isinstance(devices, Mesh) else None
    everywhere: Any
    by_rows: Any
    if isinstance(devices, Mesh):
        state_sharding = sharding.shardings(state, config, devices, parameter_name)
        everywhere, by_rows = (NamedSharding(devices, PartitionSpec(*p)) for p in ((), (None, sharding.BATCH)))
        out_shardings = (state_sharding, everywhere)
        state = jax.tree.map(_abstract, state, state_sharding)
    else:
        # Trainer's arrays are not committed to the default device, and the programs would differ.
        is_default = devices in jnp.zeros(()).devices()
        everywhere = by_rows = None if is_default else SingleDeviceSharding(devices)
        out_shardings = None
        state = jax.tree.map(lambda leaf: _abstract(leaf, everywhere), state)
    tokens_shape = (settings.batch_size // settings.micro_size, settings.micro_size, config.n_ctx)
    tokens = jax.ShapeDtypeStruct(tokens_shape, jnp.int32, sharding=by_rows)
    lr, step_number = (jax.ShapeDtypeStruct((), d, sharding=everywhere) for d in (param_dtype, jnp.int32))
    step = make_train_step(
        make_optimizer(state.model, settings),
        settings.clip,
        compute_dtype,
        settings.seed if config.drop_rate else None,
        mesh,
        out_shardings,
        tiling_for(platform_of(devices)),
    )
    return step.lower(state, (tokens, tokens), lr, step_number)


def platform_of(devices: Mesh | jax.Device) -> str:
    """Return JAX's name of the platform of a mesh or a device."""
    return (devices.devices.flat[0] if isinstance(devices, Mesh) else devices).platform


def _abstract(leaf: Any, leaf_sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding)


def memory_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes that a compiled training step takes on each device, as XLA reports them."""
    analysis: Any = compiled.memory_analysis()
    # The state is donated, so most results take no memory of their own.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes
