"""What a training step needs of each device: by a model of it, and by XLA's account of the compiled program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax import sharding
from gpt_jax.loss import LARGEST_CHUNK
from gpt_jax.model import GPTModel, cast
from gpt_jax.sharding import MeshShape, bytes_per_device, make_mesh
from gpt_jax.train import TrainState, make_optimizer, make_train_step, parameter_name
from parity.config import GPTConfig
from parity.training.settings import TrainSettings

# Numbers a token that are kept of each layer for its gradient: so many times D on every device, so many times D
# that `tensor` divides, and so many times N T, of explicit attention, divided too. Fitted to XLA's accounts of
# 48 compiled steps (2 and 12 layers, T 256 and 1024, B 2 and 8, 124M's and 1558M's widths), which they meet within
# 17 %, and of meshes.
_KEPT = {"none": (11, 11, 1.8), "products": (4, 7, 0.0), "all": (2, 0, 0.0)}
# And those of the one layer that is being computed.
_WORKING = {"none": (12, 12, 1.9), "products": (12, 19, 1.6), "all": (18, 33, 1.2)}
_LOSS = 1.4  # times the logits of a chunk
_GATHERED = 2  # times the head, and one layer, where fsdp divides them


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    moments: int
    gradients: int
    compute_copy: int
    """The parameters in the dtype that is computed in, where it is another"""
    activations: int
    """Kept of every layer for the gradient"""
    working: int
    """Of one layer, of one chunk of the loss, and what fsdp gathers for them"""

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def memory(
    config: GPTConfig, shape: MeshShape, micro_size: int, dtype: str, remat: str = "none", attention: str = "explicit"
) -> Memory:
    """Of a step over a mesh; `micro_size`: windows of a micro-batch, on all devices together."""
    itemsize = jnp.dtype(dtype).itemsize
    wide = max(4, itemsize)
    parameters = bytes_per_device(config, shape, wide)
    tokens = micro_size * config.n_ctx // (shape.data * shape.fsdp)
    scores = config.n_head * config.n_ctx if attention == "explicit" else 0

    def numbers(whole: float, divided: float, of_scores: float) -> int:
        return int(tokens * (whole * config.n_embd + (divided * config.n_embd + of_scores * scores) / shape.tensor))

    logits = min(LARGEST_CHUNK, micro_size * config.n_ctx * config.n_vocab) // (shape.data * shape.fsdp)
    loss = int(_LOSS * logits * wide)
    gathered = 0
    if shape.fsdp > 1:
        head = config.n_vocab * config.n_embd
        layer = 12 * config.n_embd**2 // shape.tensor
        gathered = _GATHERED * (head + layer) * wide
    return Memory(
        parameters=parameters,
        moments=2 * parameters,
        gradients=parameters,
        compute_copy=parameters * itemsize // wide if itemsize < wide else 0,
        activations=config.n_layer * numbers(*_KEPT[remat]) * itemsize,
        working=numbers(*_WORKING[remat]) * itemsize + loss + gathered,
    )


def communication_bytes(
    config: GPTConfig, shape: MeshShape, micro_size: int, accumulate: int, dtype: str
) -> dict[str, int]:
    """Bytes that a device sends in a step of `accumulate` micro-batches, by what for.

    Parameters are gathered in the dtype that is computed in; gradients are counted in the parameters'. A ring of n
    devices sends (n - 1) / n of an array to gather or to scatter it, and twice that to sum it.
    """
    itemsize = jnp.dtype(dtype).itemsize
    wide = max(4, itemsize)
    one = bytes_per_device(config, dataclasses.replace(shape, fsdp=1), 1)  # parameters, divided by tensor alone
    tokens = micro_size * config.n_ctx // (shape.data * shape.fsdp)
    data, fsdp, tensor = ((n - 1) / n for n in (shape.data, shape.fsdp, shape.tensor))
    passes = 4 * config.n_layer  # after both branches, forward and backward
    found = {
        "data: gradients summed": 2 * data * one / shape.fsdp * wide,
        "fsdp: parameters gathered, forward and backward": 2 * fsdp * one * itemsize * accumulate,
        "fsdp: gradients scattered": fsdp * one * wide * accumulate,
        "tensor: activations summed": 2 * tensor * passes * tokens * config.n_embd * itemsize * accumulate,
    }
    return {name: int(size) for name, size in found.items() if size}


def compiled_memory(
    config: GPTConfig, shape: MeshShape, settings: TrainSettings, remat: str = "none", unroll: int = 1
) -> int:
    """Bytes that the compiled step takes on each device, as XLA says; compiles it, and makes no arrays.

    Raises InputError where there are fewer devices than the mesh has.
    """
    optimizer, dtype = make_optimizer(settings, config), jnp.dtype(settings.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)

    def start() -> TrainState:
        model = cast(GPTModel(config, None, "explicit", unroll, remat), wide)
        return TrainState(model, optimizer.init(model))

    mesh = make_mesh(shape)
    state = jax.eval_shape(start)
    placed = sharding.shardings(state, config, mesh, parameter_name)
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, placed)
    size = (settings.accumulate, settings.batch_size // settings.accumulate, config.n_ctx)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=rows)
    lr, number = (jax.ShapeDtypeStruct((), d, sharding=whole) for d in (wide, jnp.int32))
    step = make_train_step(optimizer, settings.clip, dtype, None, mesh, (placed, whole))
    found: Any = step.lower(abstract, tokens, tokens, lr, number).compile().memory_analysis()
    # The state is donated: what comes out lies where it was.
    return found.argument_size_in_bytes + found.temp_size_in_bytes
