"""Cross-entropy from what the head reads, without ever holding all logits.

[B, T, V] logits in float32 are the largest array of a training step, and their gradient is as large. Here the
positions are taken a chunk at a time: a chunk's logits give its loss and at once the gradients of x and of the
head (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024), so that nothing of size V is kept but the
gradient of the head. The products are the same ones as in the plain way, so it costs no more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.model import GPTModel, at_least_float32
from parity.config import IGNORE_INDEX

LARGEST_CHUNK = 2**25
"""Logits of a chunk, 128 MiB in float32"""


def summed_loss(model: GPTModel, inputs: Array, targets: Array, key: Array | None = None) -> Array:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    Args:
        model: The model; the loss is computed in the dtype of its parameters.
        inputs: Token ids, integers [B, T].
        targets: Token ids [B, T]; positions with IGNORE_INDEX are left out.
        key: Turns dropout on.
    """
    head = model.tok_emb.embedding[...] if model.config.tied_head else model.out_head.kernel[...].T  # [V, D]
    return head_loss(model.hidden(inputs, key), head, targets)


def calc_loss(model: GPTModel, inputs: Array, targets: Array, key: Array | None = None) -> Array:
    """Return the mean cross-entropy in nats per target that is not ignored; the arguments are summed_loss's."""
    return summed_loss(model, inputs, targets, key) / (targets != IGNORE_INDEX).sum()


def head_loss(x: Array, head: Array, targets: Array, largest_chunk: int = LARGEST_CHUNK) -> Array:
    """Cross-entropy in nats, summed over the targets that are not IGNORE_INDEX.

    x [B, T, D], head [V, D], targets int [B, T] -> float32 (or float64). `largest_chunk`: most logits at a time.
    """
    chunks = _chunks(x.shape[0] * head.shape[0], x.shape[1], largest_chunk)
    return _head_loss(x, head, targets, chunks)


def _chunks(logits_a_position: int, T: int, largest: int) -> int:
    """The smallest number of equal chunks of T positions that keeps to the largest; T chunks if none does."""
    return next(n for n in range(1, T + 1) if T % n == 0 and (logits_a_position * (T // n) <= largest or n == T))


def _cut(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B * T / chunks, ...]: along T, as B may be divided over devices."""
    parts = jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)
    return parts.reshape(chunks, -1, *x.shape[2:])


def _join(parts: Array, like: Array) -> Array:
    """The inverse of _cut()."""
    cut = parts.reshape(parts.shape[0], like.shape[0], -1, *like.shape[2:])
    return jnp.moveaxis(cut, 0, 1).reshape(like.shape)


def _chunk(x: Array, head: Array, targets: Array) -> tuple[Array, Array]:
    """x [R, D], targets [R] -> (summed loss, softmax [R, V], zero in the rows without a target)."""
    logits = at_least_float32(x @ head.T)
    largest = logits.max(axis=-1, keepdims=True)
    raised = jnp.exp(logits - largest)
    total = raised.sum(axis=-1, keepdims=True)
    counted = (targets != IGNORE_INDEX)[:, None]
    right = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    loss = jnp.where(counted, jnp.log(total) + largest - right, 0).sum()
    return loss, (raised * (counted / total)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _head_loss(x: Array, head: Array, targets: Array, chunks: int) -> Array:
    def one(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _chunk(part[0], head, part[1])[0], None

    zero = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.scan(one, zero, (_cut(x, chunks), _cut(targets, chunks)))[0]


def _forward(x: Array, head: Array, targets: Array, chunks: int) -> tuple[Array, tuple[Array, Array]]:
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one(carry: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (total, head_gradient), (x, targets) = carry, part
        loss, pattern = _chunk(x, head, targets)
        # The gradient of the logits is the softmax less one at the target; the one is taken off afterwards.
        wanted, counted = jnp.maximum(targets, 0), (targets != IGNORE_INDEX)[:, None]
        more = jnp.einsum("RV,RD->VD", pattern, x, preferred_element_type=wide)
        more = more.at[wanted].add(-jnp.where(counted, x, 0).astype(wide))
        return (total + loss, head_gradient + more), pattern @ head - jnp.where(counted, head[wanted], 0)

    start = (jnp.zeros((), wide), jnp.zeros(head.shape, wide))
    (total, head_gradient), x_gradient = jax.lax.scan(one, start, (_cut(x, chunks), _cut(targets, chunks)))
    return total, (_join(x_gradient, x), head_gradient.astype(head.dtype))


def _backward(chunks: int, gradients: tuple[Array, Array], cotangent: Array) -> tuple[Any, Any, None]:
    x_gradient, head_gradient = ((g * cotangent).astype(g.dtype) for g in gradients)
    return x_gradient, head_gradient, None


_head_loss.defvjp(_forward, _backward)
