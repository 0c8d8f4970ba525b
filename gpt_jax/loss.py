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

from gpt_jax.model import at_least_float32
from parity.data import NO_TARGET

LARGEST_CHUNK = 2**24
"""Logits of a chunk, 64 MiB in float32"""


def head_loss(x: Array, head: Array, targets: Array, largest_chunk: int = LARGEST_CHUNK) -> Array:
    """Cross-entropy in nats, summed over the targets that are not NO_TARGET.

    x [B, T, D], head [V, D], targets int [B, T] -> float32 (or float64). `largest_chunk`: most logits at a time.
    """
    chunks = _chunks(x.shape[0] * head.shape[0], x.shape[1], largest_chunk)
    return _head_loss(x, head, targets, chunks)


def _chunks(logits_a_position: int, T: int, largest: int) -> int:
    """The smallest number of equal chunks of T positions that keeps to the largest; T chunks if none does."""
    return next(n for n in range(1, T + 1) if T % n == 0 and (logits_a_position * (T // n) <= largest or n == T))


def _cut(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...]: along T, as B may be divided over devices."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)


def _chunk(x: Array, head: Array, targets: Array) -> tuple[Array, Array]:
    """(summed loss, its gradient with respect to the logits) of a chunk."""
    logits = at_least_float32(jnp.einsum("BTD,VD->BTV", x, head))
    wanted = jnp.maximum(targets, 0)[..., None]
    counted = (targets != NO_TARGET)[..., None]
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    loss = jnp.where(counted, normaliser - jnp.take_along_axis(logits, wanted, axis=-1), 0).sum()
    right = jnp.arange(logits.shape[-1]) == wanted
    return loss, jnp.where(counted, jnp.exp(logits - normaliser) - right, 0).astype(x.dtype)


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
        loss, logits_gradient = _chunk(x, head, targets)
        more = jnp.einsum("BTV,BTD->VD", logits_gradient, x, preferred_element_type=wide)
        return (total + loss, head_gradient + more), jnp.einsum("BTV,VD->BTD", logits_gradient, head)

    start = (jnp.zeros((), wide), jnp.zeros(head.shape, wide))
    (total, head_gradient), x_gradient = jax.lax.scan(one, start, (_cut(x, chunks), _cut(targets, chunks)))
    return total, (jnp.moveaxis(x_gradient, 0, 1).reshape(x.shape), head_gradient.astype(head.dtype))


def _backward(chunks: int, gradients: tuple[Array, Array], cotangent: Array) -> tuple[Any, Any, None]:
    x_gradient, head_gradient = ((g * cotangent).astype(g.dtype) for g in gradients)
    return x_gradient, head_gradient, None


_head_loss.defvjp(_forward, _backward)
