"""Cross-entropy of the model's logits, which are never all in memory; gpt_torch/loss.py computes them at once.

The float32 logits [B, T, V] are the largest array of a training step, and their gradient is as large. Here the
positions are processed in chunks: the logits of a chunk yield its loss and, immediately, the gradients of x and of
the head (as in Liger's fused linear cross-entropy, Hsu et al. 2024), so that the only array of size V that is kept is
the gradient of the head. The matrix products are those of the direct computation, so it costs no more.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpt_jax.arrays import at_least_float32, widened
from gpt_jax.model import GPTModel
from gpt_jax.sharding import BATCH, RULES
from parity.config import IGNORE_INDEX, is_counted


class Tiling(NamedTuple):
    """How the logits are divided on a kind of device. It changes the speed and the memory, not the result."""

    largest_chunk: int
    """Upper limit of the number of logits that exist at a time on each device."""
    vocab_multiple: int
    """The vocabulary is padded to a multiple of this, with logits of minus infinity, if that adds at most 1 %."""


CPU_TILING = Tiling(largest_chunk=2**25, vocab_multiple=1)
GPU_TILING = Tiling(largest_chunk=2**29, vocab_multiple=128)


def tiling_for(platform: str) -> Tiling:
    """Return the tiling for JAX's name of a platform. Pass the platform of the device that the step is compiled for."""
    return CPU_TILING if platform == "cpu" else GPU_TILING


def summed_loss(
    model: GPTModel,
    inputs: Array,
    targets: Array,
    key: Array | None = None,
    tiling: Tiling = CPU_TILING,
    mesh: Mesh | None = None,
) -> Array:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    Args:
        model: The model; the loss is computed in the dtype of its parameters.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]. Targets -1 and -100 are ignored; any other target outside the
            vocabulary makes the loss and its gradients NaN, because a compiled function cannot raise.
        key: Turns dropout on.
        tiling: See head_loss.
        mesh: See head_loss.

    Returns:
        A scalar of dtype float32 or float64.
    """
    return head_loss(model.hidden(inputs, key), head_matrix(model), targets, tiling, mesh, model.config.tied_head)


def calc_loss(model: GPTModel, inputs: Array, targets: Array, key: Array | None = None) -> Array:
    """Return the mean cross-entropy in nats per target that is not ignored.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]; -1 and -100 are ignored.
        key: Turns dropout on.

    Raises:
        InputError: For any other target outside the vocabulary. Under jax.jit the loss is NaN instead.
    """
    if not isinstance(targets, jax.core.Tracer):
        model.config.check_targets(np.asarray(targets))
    loss = summed_loss(model, inputs, targets, key)
    return loss / is_counted(targets).sum(dtype=loss.dtype)


def head_matrix(model: GPTModel) -> Array:
    """Return the weights of the output head, [V, D]."""
    return model.tok_emb.embedding[...] if model.config.tied_head else model.out_head.kernel[...].T


def head_loss(
    x: Array,
    head: Array,
    targets: Array,
    tiling: Tiling = CPU_TILING,
    mesh: Mesh | None = None,
    tied: bool = True,
) -> Array:
    """Return the cross-entropy in nats, summed over the targets that are not ignored, without keeping all logits.

    Args:
        x: Input of the head [B, T, D].
        head: Weights of the head [V, D].
        targets: The ids to predict, integers [B, T]; see summed_loss.
        tiling: Size of the chunks.
        mesh: Devices over which x is sharded. Each of them processes its own rows, and its part of their positions if
            `tensor` divides T. The gradient of the head is summed over the devices once, after the last chunk. XLA
            would sum it after every chunk.
        tied: Whether the head is a parameter as it is, the token embedding. Otherwise it is the transpose of one, and
            its gradient is computed as [D, V]: XLA for CPUs takes long to transpose it.

    Returns:
        A scalar of dtype float32 or float64.
    """
    counted = is_counted(targets)
    invalid = counted & ((targets < 0) | (targets >= head.shape[0]))
    # x becomes NaN, and with it the loss. A factor of the loss would be one of the head's gradient too, [V, D].
    x = x * jnp.where(invalid.any(), jnp.nan, 1.0).astype(x.dtype)
    targets = jnp.where(counted, jnp.where(invalid, 0, targets), IGNORE_INDEX)
    if mesh is None:
        return _head_loss(x, head, targets, tiling, tied)
    return _over_mesh(functools.partial(_head_loss, tiling=tiling, tied=tied), mesh, x.shape[1:])(x, head, targets)


def _over_mesh(loss: Callable[..., Array], mesh: Mesh, shape: tuple[int, ...]) -> Callable[..., Array]:
    """Return the sum over a mesh of loss(x, head, targets), of which each device computes a part; `shape` is (T, D)."""
    (T, D), fsdp, tensor = shape, RULES["D"], RULES["N"]
    axes = (*BATCH, tensor) if T % mesh.shape[tensor] == 0 else BATCH  # that the positions [B, T] are sharded over
    head_axes = (fsdp,) if mesh.shape[fsdp] > 1 and D % mesh.shape[fsdp] == 0 else ()

    def local(x: Array, head: Array, targets: Array) -> Array:
        # The transpose of these lines sums the gradient of the head over the devices, in the dtype of the head.
        head = jax.lax.pcast(head, tuple(axis for axis in axes if axis not in head_axes), to="varying")
        if head_axes:
            head = jax.lax.all_gather(head, fsdp, axis=1, tiled=True)
        return jax.lax.psum(loss(x, head, targets), axes)

    rows = P(BATCH, tensor) if tensor in axes else P(BATCH)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, P(None, *head_axes), rows), out_specs=P())


def n_chunks(logits_per_position: int, T: int, largest: int) -> int:
    """Return the smallest number of equal chunks of T positions that keeps the limit, or T if none does."""
    return next(n for n in range(1, T + 1) if T % n == 0 and (logits_per_position * (T // n) <= largest or n == T))


def _cut(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B * T / chunks, ...]; cut along T, because XLA may have sharded B."""
    parts = jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)
    return parts.reshape(chunks, -1, *x.shape[2:])


def _join(parts: Array, like: Array) -> Array:
    """Undo _cut()."""
    cut = parts.reshape(parts.shape[0], like.shape[0], -1, *like.shape[2:])
    return jnp.moveaxis(cut, 0, 1).reshape(like.shape)


def _pad_vocabulary(head: Array, multiple: int) -> Array:
    """[V, D] -> [V + padding, D]"""
    padding = -head.shape[0] % multiple
    return jnp.pad(head, ((0, padding), (0, 0))) if padding * 100 <= head.shape[0] else head


def _chunk(x: Array, head: Array, targets: Array, n_vocab: int) -> tuple[Array, Array]:
    """x [R, D], targets [R] -> (summed loss, softmax [R, V] with zeros in the rows whose target is ignored)."""
    logits = at_least_float32(jnp.einsum("RD,VD->RV", x, head))
    if head.shape[0] > n_vocab:
        # Not jnp.where: JAX moves its two broadcasts, which are as large as the logits, out of the loop over chunks.
        nothing, padding = jnp.asarray(-jnp.inf, logits.dtype), head.shape[0] - n_vocab
        logits = jax.lax.pad(logits[:, :n_vocab], nothing, ((0, 0, 0), (0, padding, 0)))
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    counted = (targets != IGNORE_INDEX)[:, None]
    target_logits = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    shifted = target_logits - largest  # in this order; log(total) + largest would be rounded to the size of `largest`
    loss = jnp.where(counted, jnp.log(total) - shifted, 0).sum()
    return loss, (exponentials * (counted.astype(total.dtype) / total)).astype(x.dtype)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros in which sums over `like` can be accumulated: in float32 at least, and as `like` varies over a mesh."""
    return jax.lax.full_like(like, 0, widened(like.dtype), shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _head_loss(x: Array, head: Array, targets: Array, tiling: Tiling, tied: bool) -> Array:
    n_vocab, head = head.shape[0], _pad_vocabulary(head, tiling.vocab_multiple)
    chunks = n_chunks(x.shape[0] * head.shape[0], x.shape[1], tiling.largest_chunk)

    def add_chunk(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x, targets = chunk
        return total + _chunk(x, head, targets, n_vocab)[0], None

    return jax.lax.scan(add_chunk, _zeros((), x), (_cut(x, chunks), _cut(targets, chunks)))[0]


def _loss_and_gradients(
    x: Array, head: Array, targets: Array, tiling: Tiling, tied: bool
) -> tuple[Array, Array, Array]:
    n_vocab, head = head.shape[0], _pad_vocabulary(head, tiling.vocab_multiple)
    chunks = n_chunks(x.shape[0] * head.shape[0], x.shape[1], tiling.largest_chunk)

    def add_chunk(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (total, head_gradient), (x, targets) = carry, chunk
        loss, probs = _chunk(x, head, targets, n_vocab)
        # The gradient of the logits is the softmax minus 1 at the target; the 1 is subtracted afterwards.
        ids, counted = jnp.maximum(targets, 0), (targets != IGNORE_INDEX)[:, None]
        factors = ("RV,RD->VD", probs, x) if tied else ("RD,RV->DV", x, probs)
        partial = jnp.einsum(*factors, preferred_element_type=widened(x.dtype))
        at_targets = -jnp.where(counted, x, 0).astype(partial.dtype)
        partial = partial.at[ids].add(at_targets) if tied else partial.at[:, ids].add(at_targets.T)
        return (total + loss, head_gradient + partial), probs @ head - jnp.where(counted, head[ids], 0)

    start = (_zeros((), x), _zeros(head.shape if tied else head.shape[::-1], x))
    (total, head_gradient), x_gradient = jax.lax.scan(add_chunk, start, (_cut(x, chunks), _cut(targets, chunks)))
    head_gradient = head_gradient if tied else head_gradient.T
    return total, _join(x_gradient, x), head_gradient[:n_vocab].astype(head.dtype)


@functools.partial(_head_loss.defjvp, symbolic_zeros=True)
def _head_loss_jvp(tiling: Tiling, tied: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The derivative as products with the gradients: linear in the tangents, so that JAX transposes it for jax.grad.

    jax.custom_vjp would do the same for jax.grad only, and refuse jax.jvp and jax.jacfwd.
    """
    x, head, targets = primals
    loss, *gradients = _loss_and_gradients(x, head, targets, tiling, tied)
    products = [
        (gradient.astype(loss.dtype) * tangent.astype(loss.dtype)).sum()
        for gradient, tangent in zip(gradients, tangents[:2], strict=True)
        if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    ]
    return loss, sum(products, start=jnp.zeros_like(loss))
