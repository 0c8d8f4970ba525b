"""Array functions of the model. None of them mixes ranks or dtypes, which JAX's strict modes forbid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity.config import GPTConfig


def widened(dtype: Any) -> Any:
    """The dtype, or float32 if the dtype has fewer bits. jnp.promote_types raises in JAX's strict mode."""
    return np.promote_types(dtype, np.float32)


def at_least_float32(x: Array) -> Array:
    return x.astype(widened(x.dtype))


def shifted_logsumexp(logits: Array) -> tuple[Array, Array]:
    """Return the largest of logits [..., V], and the log of the sum of exp(logits - largest), each [..., 1].

    Subtract both in turn from logits: their sum would be rounded to its own size, which is far from that of the result.
    """
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    return largest, jnp.log(jnp.exp(logits - largest).sum(axis=-1, keepdims=True))


def add_axes(vector: Array, like: Array) -> Array:
    """[D] -> [..., D], with as many axes as `like` and its dtype, as JAX's strict modes require."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape).astype(like.dtype)


def merge_heads(x: Array) -> Array:
    """[B, T, N, H] -> [BN, T, H]"""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Set elements to zero with probability `rate`, and scale the others up (Srivastava et al. 2014).

    Without a key, x is returned as it is.
    """
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def split_key(key: Array | None, num: int) -> Any:
    """Split a key into `num` keys; None is split into `num` times None."""
    return (None,) * num if key is None else jax.random.split(key, num)


def check_ids(tokens: Array, config: GPTConfig) -> None:
    """Raise InputError for an id outside the vocabulary, unless the ids have no values because they are traced."""
    if not isinstance(tokens, jax.core.Tracer):
        ids = np.asarray(tokens)
        config.check_tokens(ids.shape, int(ids.min(initial=0)), int(ids.max(initial=0)))
