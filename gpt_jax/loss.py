"""Cross-entropy of the model's logits, which are never all in memory; gpt_torch/loss.py computes them at once.

The float32 logits [B, T, V] are the largest array of a training step, and their gradient is as large. Here the
positions are processed in chunks: the logits of a chunk yield its loss and, immediately, the gradients of x and of
the head (as in Liger's fused linear cross-entropy, Hsu et al. 2024), so that the only array of size V that is kept is
the gradient of the head. The matrix products are those of the direct computation, so it costs no more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.arrays import at_least_float32, widened
from gpt_jax.model import GPTModel
from parity.config import IGNORE_INDEX, is_counted

LARGEST_CHUNK = 2**25
"""Number of logits in a chunk: 128 MiB in float32."""


def summed_loss(model: GPTModel, inputs: Array, targets: Array, key: Array | None = None) -> Array:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    Args:
        model: The model; the loss is computed in the dtype of its parameters.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]. Targets -1 and -100 are ignored; any other target outside the
            vocabulary makes the loss and its gradients NaN, because a compiled function cannot raise.
        key: Turns dropout on.

    Returns:
        A scalar of dtype float32 or float64.
    """
    head = model.tok_emb.embedding[...] if model.config.tied_head else model.out_head.kernel[...].T  # [V, D]
    return head_loss(model.hidden(inputs, key), head, targets)


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


def head_loss(x: Array, head: Array, targets: Array, largest_chunk: int = LARGEST_CHUNK) -> Array:
    """Return the cross-entropy in nats, summed over the targets that are not ignored, without keeping all logits.

    Args:
        x: Input of the head [B, T, D].
        head: Weights of the head [V, D].
        targets: The ids to predict, integers [B, T]; see summed_loss.
        largest_chunk: Upper limit of the number of logits that exist at a time.

    Returns:
        A scalar of dtype float32 or float64.
    """
    chunks = _chunks(x.shape[0] * head.shape[0], x.shape[1], largest_chunk)
    counted = is_counted(targets)
    valid = counted & (targets >= 0) & (targets < head.shape[0])
    loss = _head_loss(x, head, jnp.where(valid, targets, IGNORE_INDEX), chunks)
    return loss * jnp.where((counted & ~valid).any(), jnp.nan, 1.0)


def _chunks(logits_per_position: int, T: int, largest: int) -> int:
    """Return the smallest number of equal chunks of T positions that keeps the limit, or T if none does."""
    return next(n for n in range(1, T + 1) if T % n == 0 and (logits_per_position * (T // n) <= largest or n == T))


def _cut(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B * T / chunks, ...]; cut along T, because B may be sharded."""
    parts = jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)
    return parts.reshape(chunks, -1, *x.shape[2:])


def _join(parts: Array, like: Array) -> Array:
    """Undo _cut()."""
    cut = parts.reshape(parts.shape[0], like.shape[0], -1, *like.shape[2:])
    return jnp.moveaxis(cut, 0, 1).reshape(like.shape)


def _chunk(x: Array, head: Array, targets: Array) -> tuple[Array, Array]:
    """x [R, D], targets [R] -> (summed loss, softmax [R, V] with zeros in the rows whose target is ignored)."""
    logits = at_least_float32(x @ head.T)
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    counted = (targets != IGNORE_INDEX)[:, None]
    target_logits = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    loss = jnp.where(counted, jnp.log(total) + largest - target_logits, 0).sum()
    return loss, (exponentials * (counted.astype(total.dtype) / total)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _head_loss(x: Array, head: Array, targets: Array, chunks: int) -> Array:
    def add_chunk(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x, targets = chunk
        return total + _chunk(x, head, targets)[0], None

    zero = jnp.zeros((), widened(x.dtype))
    return jax.lax.scan(add_chunk, zero, (_cut(x, chunks), _cut(targets, chunks)))[0]


def _loss_and_gradients(x: Array, head: Array, targets: Array, chunks: int) -> tuple[Array, Array, Array]:
    accumulated = widened(x.dtype)

    def add_chunk(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (total, head_gradient), (x, targets) = carry, chunk
        loss, probs = _chunk(x, head, targets)
        # The gradient of the logits is the softmax minus 1 at the target; the 1 is subtracted afterwards.
        ids, counted = jnp.maximum(targets, 0), (targets != IGNORE_INDEX)[:, None]
        partial = jnp.einsum("RV,RD->VD", probs, x, preferred_element_type=accumulated)
        partial = partial.at[ids].add(-jnp.where(counted, x, 0).astype(accumulated))
        return (total + loss, head_gradient + partial), probs @ head - jnp.where(counted, head[ids], 0)

    start = (jnp.zeros((), accumulated), jnp.zeros(head.shape, accumulated))
    (total, head_gradient), x_gradient = jax.lax.scan(add_chunk, start, (_cut(x, chunks), _cut(targets, chunks)))
    return total, _join(x_gradient, x), head_gradient.astype(head.dtype)


@functools.partial(_head_loss.defjvp, symbolic_zeros=True)
def _head_loss_jvp(chunks: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The derivative as products with the gradients: linear in the tangents, so that JAX transposes it for jax.grad.

    jax.custom_vjp would do the same for jax.grad only, and refuse jax.jvp and jax.jacfwd.
    """
    x, head, targets = primals
    loss, *gradients = _loss_and_gradients(x, head, targets, chunks)
    products = [
        (gradient.astype(loss.dtype) * tangent.astype(loss.dtype)).sum()
        for gradient, tangent in zip(gradients, tangents[:2], strict=True)
        if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    ]
    return loss, sum(products, start=jnp.zeros_like(loss))
