"""Memory and communication of a training step per device.

They are estimated from shapes; gpt_jax/lowering.py compiles the step, whose memory XLA reports.
"""

import dataclasses

import jax.numpy as jnp

from gpt_jax.loss import n_chunks, tiling_for
from gpt_jax.model import ATTENTIONS
from gpt_jax.sharding import MeshShape, bytes_per_device
from parity.config import GPTConfig
from parity.errors import check_choice
from parity.weights.adapters import LoraConfig, n_adapter_params

# Number of activation values saved per token and layer for the backward pass, for each attention and value of the
# option remat: (multiples of D that are replicated, multiples of D that are sharded by `tensor`, multiples of N T in
# the explicit attention, which are sharded by `tensor` as well). They are fitted to the memory that XLA reports: for
# the explicit attention of steps on CPUs (2 and 12 layers, T 256 and 1024, B 2 and 8, widths of 124M and 1558M, within
# 17 %), for cuDNN's of steps compiled for H100s (all sizes, one and eight devices, within 7 %, unrolled).
_SAVED = {
    "explicit": {"none": (11, 11, 1.8), "products": (4, 7, 0.0), "all": (2, 0, 0.0)},
    "cudnn": {"none": (4, 12, 0.0), "products": (2, 7, 0.0), "all": (2, 0, 0.0)},
}
# The same for the activations of the layer whose backward pass is being computed, which exist only during it.
_WORKING = {
    "explicit": {"none": (12, 12, 1.9), "products": (12, 19, 1.6), "all": (18, 33, 1.2)},
    "cudnn": {"none": (4, 8, 0.0), "products": (6, 14, 0.0), "all": (6, 14, 0.0)},
}
_GATHERED = 2  # copies of one layer's parameters that fsdp gathers


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
    """The activations of one layer during its backward pass or the arrays of the loss, whichever are larger, and the
    parameters that fsdp gathers."""

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def memory(
    config: GPTConfig,
    shape: MeshShape,
    micro_size: int,
    dtype: str,
    remat: str = "none",
    attention: str = "explicit",
    platform: str = "gpu",
    lora: LoraConfig | None = None,
) -> Memory:
    """Estimate the memory of a training step on each device.

    Args:
        config: The model's configuration.
        shape: Number of devices along each axis of the mesh.
        micro_size: Windows per micro-batch, over all devices.
        dtype: The compute dtype.
        remat: What the backward pass recomputes: "none", "products" or "all" (see GPTModel).
        attention: "explicit" or "cudnn"; only the explicit attention stores its patterns.
        platform: JAX's name of the platform, which decides the size of the loss's chunks.
        lora: Adapters to train in place of the model. Only they have gradients and moments.

    Raises:
        InputError: For an unknown remat or attention.
    """
    check_choice("attention", attention, ATTENTIONS)
    check_choice("remat", remat, tuple(_SAVED[attention]))
    itemsize = jnp.dtype(dtype).itemsize
    param_itemsize = max(4, itemsize)
    parameters = trained = bytes_per_device(config, shape, param_itemsize)
    if lora is not None:
        trained = n_adapter_params(config, lora) * param_itemsize  # they are small, so this counts them as replicated
        parameters += trained
    tokens = micro_size * config.n_ctx // (shape.data * shape.fsdp)

    def activations(replicated: float, sharded: float, patterns: float) -> int:
        per_token = replicated * config.n_embd
        per_token += (sharded * config.n_embd + patterns * config.n_head * config.n_ctx) / shape.tensor
        return int(tokens * per_token) * itemsize

    gathered = _GATHERED * 12 * config.n_embd**2 // shape.tensor * itemsize if shape.fsdp > 1 else 0
    return Memory(
        parameters=parameters,
        moments=2 * trained,
        gradients=trained,
        compute_copy=parameters * itemsize // param_itemsize if itemsize < param_itemsize else 0,
        activations=config.n_layer * activations(*_SAVED[attention][remat]),
        working=max(activations(*_WORKING[attention][remat]), _loss(config, shape, tokens, itemsize, platform))
        + gathered,
    )


def _loss(config: GPTConfig, shape: MeshShape, tokens: int, itemsize: int, platform: str) -> int:
    """Return the bytes of the loss: logits and probabilities of a chunk, its inputs, and two copies of the head."""
    rows, T = tokens // config.n_ctx, config.n_ctx
    if T % shape.tensor == 0:
        T //= shape.tensor
    chunk = T // n_chunks(rows * config.n_vocab, T, tiling_for(platform).largest_chunk)
    logits = rows * chunk * config.n_vocab
    head = config.n_vocab * config.n_embd
    inputs = 3 * rows * T * config.n_embd  # the input of the head, cut into chunks, and its gradient
    return (2 * logits + 2 * head + inputs) * itemsize + head * max(4, itemsize)


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
