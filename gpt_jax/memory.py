"""Memory and communication of a training step per device.

memory() and communication_bytes() estimate from shapes; compiled_memory() returns what XLA reports.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax import sharding
from gpt_jax.arrays import widened
from gpt_jax.loss import CPU_TILING
from gpt_jax.model import ATTENTIONS, GPTModel, cast
from gpt_jax.sharding import MeshShape, bytes_per_device, make_mesh
from gpt_jax.train import TrainState, make_optimizer, make_train_step, parameter_name
from parity.config import GPTConfig
from parity.errors import check_choice
from parity.training.settings import TrainSettings

# Number of activation values saved per token and layer for the backward pass, for each value of the option remat:
# (multiples of D that are replicated, multiples of D that are sharded by `tensor`, multiples of N T in the explicit
# attention, which are sharded by `tensor` as well). They are fitted to the memory that XLA reports for steps on meshes
# and for 48 steps on one device (2 and 12 layers, T 256 and 1024, B 2 and 8, widths of 124M and 1558M); they match the
# latter within 17 %.
_SAVED = {"none": (11, 11, 1.8), "products": (4, 7, 0.0), "all": (2, 0, 0.0)}
# The same for the activations of the layer whose backward pass is being computed, which exist only during it.
_WORKING = {"none": (12, 12, 1.9), "products": (12, 19, 1.6), "all": (18, 33, 1.2)}
_LOSS = 1.4  # memory of the loss, as a multiple of the logits of a chunk
_GATHERED = 2  # copies of the head, and of one layer, that fsdp gathers


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    moments: int
    gradients: int
    compute_copy: int
    """The parameters cast to the compute dtype; 0 if they already have it."""
    activations: int
    """Activations of all layers that are saved for the backward pass."""
    working: int
    """Activations of one layer, logits of one chunk of the loss, and the parameters that fsdp gathers for them."""

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def memory(
    config: GPTConfig, shape: MeshShape, micro_size: int, dtype: str, remat: str = "none", attention: str = "explicit"
) -> Memory:
    """Estimate the memory of a training step on each device.

    Args:
        config: The model's configuration.
        shape: Number of devices along each axis of the mesh.
        micro_size: Windows per micro-batch, over all devices.
        dtype: The compute dtype.
        remat: What the backward pass recomputes: "none", "products" or "all" (see GPTModel).
        attention: "explicit" or "cudnn"; only the explicit attention stores its patterns.

    Raises:
        InputError: For an unknown remat or attention.
    """
    check_choice("remat", remat, tuple(_SAVED))
    check_choice("attention", attention, ATTENTIONS)
    itemsize = jnp.dtype(dtype).itemsize
    param_itemsize = max(4, itemsize)
    parameters = bytes_per_device(config, shape, param_itemsize)
    tokens = micro_size * config.n_ctx // (shape.data * shape.fsdp)
    scores = config.n_head * config.n_ctx if attention == "explicit" else 0

    def n_values(replicated: float, sharded: float, patterns: float) -> int:
        per_token = replicated * config.n_embd + (sharded * config.n_embd + patterns * scores) / shape.tensor
        return int(tokens * per_token)

    logits = min(CPU_TILING.largest_chunk, tokens * config.n_vocab // shape.tensor)
    loss = int(_LOSS * logits * param_itemsize)
    gathered = 0
    if shape.fsdp > 1:
        head = config.n_vocab * config.n_embd
        layer = 12 * config.n_embd**2 // shape.tensor
        gathered = _GATHERED * (head + layer) * param_itemsize
    return Memory(
        parameters=parameters,
        moments=2 * parameters,
        gradients=parameters,
        compute_copy=parameters * itemsize // param_itemsize if itemsize < param_itemsize else 0,
        activations=config.n_layer * n_values(*_SAVED[remat]) * itemsize,
        working=n_values(*_WORKING[remat]) * itemsize + loss + gathered,
    )


def communication_bytes(
    config: GPTConfig, shape: MeshShape, micro_size: int, accumulate: int, dtype: str, platform: str = "gpu"
) -> dict[str, int]:
    """Estimate the bytes that each device sends in one step of `accumulate` micro-batches, by purpose.

    Parameters are gathered, and gradients summed, once per micro-batch in the compute dtype. In a ring of n devices, an
    all-gather or a reduce-scatter sends (n - 1) / n of the array, and an all-reduce twice that.

    Args:
        config: The model's configuration.
        shape: Number of devices along each axis of the mesh.
        micro_size: Windows per micro-batch, over all devices.
        accumulate: Number of micro-batches.
        dtype: The compute dtype.
        platform: JAX's name of the platform. On "cpu" XLA does not use reduce-scatter: it makes an all-reduce and keeps
            a part of the result.
    """
    itemsize = jnp.dtype(dtype).itemsize
    n_parameters = bytes_per_device(config, dataclasses.replace(shape, fsdp=1), 1)  # sharded by `tensor` alone
    tokens = micro_size * config.n_ctx // (shape.data * shape.fsdp)
    data, fsdp, tensor = ((n - 1) / n for n in (shape.data, shape.fsdp, shape.tensor))
    sums = 4 * config.n_layer  # after attention and MLP, forward and backward
    # A head that `tensor` does not divide: each of its devices computes the loss of a part of the positions.
    head = 0 if config.n_vocab % shape.tensor == 0 else config.n_vocab * config.n_embd // shape.fsdp
    scatter = 1 if platform != "cpu" else 2
    numbers = {
        "data: all-reduce of gradients": 2 * data * n_parameters / shape.fsdp,
        "fsdp: all-gather of parameters, forward and backward": 2 * fsdp * n_parameters,
        "fsdp: reduce-scatter of gradients": scatter * fsdp * n_parameters,
        "tensor: all-reduce of activations": 2 * tensor * sums * tokens * config.n_embd,
        "tensor: all-reduce of the head's gradient": 2 * tensor * head,
    }
    return {name: int(number * itemsize * accumulate) for name, number in numbers.items() if number}


def compiled_memory(
    config: GPTConfig, shape: MeshShape, settings: TrainSettings, remat: str = "none", unroll: int = 1
) -> int:
    """Return the bytes that the compiled training step needs on each device, as XLA reports them.

    The step is compiled for the mesh with the explicit attention and without dropout; no array is allocated.

    Args:
        config: The model's configuration.
        shape: Number of devices along each axis of the mesh.
        settings: Settings of the run: batch size, micro-batches and dtype.
        remat: What the backward pass recomputes: "none", "products" or "all" (see GPTModel).
        unroll: Number of layers per iteration of the compiled loop over layers.

    Raises:
        InputError: If there are fewer devices than the mesh has.
    """
    compute_dtype = jnp.dtype(settings.dtype)
    param_dtype = widened(compute_dtype)

    def initial_state() -> TrainState:
        model = cast(GPTModel(config, None, "explicit", unroll, remat), param_dtype)
        return TrainState(model, make_optimizer(model, settings).init(model))

    mesh = make_mesh(shape)
    state = jax.eval_shape(initial_state)
    state_sharding = sharding.shardings(state, config, mesh, parameter_name)
    replicated = NamedSharding(mesh, PartitionSpec())
    by_rows = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, state_sharding)
    tokens_shape = (settings.accumulate, settings.batch_size // settings.accumulate, config.n_ctx)
    tokens = jax.ShapeDtypeStruct(tokens_shape, jnp.int32, sharding=by_rows)
    lr, step_number = (jax.ShapeDtypeStruct((), d, sharding=replicated) for d in (param_dtype, jnp.int32))
    optimizer = make_optimizer(state.model, settings)
    step = make_train_step(optimizer, settings.clip, compute_dtype, None, mesh, (state_sharding, replicated))
    analysis: Any = step.lower(abstract, tokens, tokens, lr, step_number).compile().memory_analysis()
    # The state is donated, so the outputs take no memory of their own.
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
