"""From logits to a token in JAX, by the rules of parity/sampling.py; gpt_torch/sampling.py has the same."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from parity.sampling import ActiveRules, RowOptions


def choose(logits: Array, seen: Array | None, u: Array, options: RowOptions, active: ActiveRules) -> Array:
    """Choose a token for each row.

    Args:
        logits: float [B, V].
        seen: bool [B, V], the tokens that are already in each row; needed for a repetition penalty only.
        u: float32 [B], uniform random numbers in [0, 1).
        options: Arrays [B]; they may be traced.
        active: The rules that at least one row uses; static under jit.

    Returns:
        Token ids, int32 [B].
    """
    if active.repetition_penalty and seen is not None:
        logits = apply_repetition_penalty(logits, seen, options)
    if not active.sampled:
        return logits.argmax(axis=-1).astype(jnp.int32)
    probs = filtered_probs(logits, options, active)
    kept = probs > 0
    cdf = probs.cumsum(axis=-1)
    reached = (cdf > as_column(u, cdf) * cdf[:, -1:]) & kept
    last_kept = probs.shape[-1] - 1 - kept[:, ::-1].argmax(axis=-1)
    token = jnp.where(reached.any(axis=-1), reached.argmax(axis=-1), last_kept)
    return jnp.where(options.greedy, logits.argmax(axis=-1), token).astype(jnp.int32)


def apply_repetition_penalty(logits: Array, seen: Array, options: RowOptions) -> Array:
    penalty = as_column(options.repetition_penalty, logits)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered_probs(logits: Array, options: RowOptions, active: ActiveRules) -> Array:
    """Probabilities [B, V] after the temperature, with 0 for the tokens that a filter drops."""
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / as_column(options.temperature, logits)
    if active.top_k:
        among_k = keep_largest(logits, lambda larger: larger.sum(axis=-1, dtype=jnp.int32) < options.top_k)
        scaled = jnp.where(among_k, scaled, -jnp.inf)
    probs = jax.nn.softmax(scaled, axis=-1)  # [B, V]
    most_probable = probs.max(axis=-1, keepdims=True)
    if active.top_p:
        top_p = as_column(options.top_p, logits)[:, 0]
        all_probs = probs
        within = keep_largest(probs, lambda larger: jnp.where(larger, all_probs, 0).sum(axis=-1) < top_p)
        probs = jnp.where(within, probs, 0.0)
    if active.min_p:
        probs = jnp.where(probs < as_column(options.min_p, logits) * most_probable, 0.0, probs)
    return probs


def keep_largest(values: Array, few_enough: Callable[[Array], Array]) -> Array:
    """The mask [B, V] of the values for which the set of strictly larger values is `few_enough`.

    `few_enough` maps such a set, a mask [B, V], to bool [B]. The smallest of these values is searched for among the
    floats in the order of their bits, because XLA's sort and top_k are twenty times slower on a CPU.
    """
    ordered = in_order(values)
    cpu, default = (functools.partial(search, few_enough=few_enough) for search in (bisect, search_digits))
    threshold = jax.lax.platform_dependent(ordered, cpu=cpu, default=default)
    return ordered >= threshold[:, None]


def in_order(values: Array) -> Array:
    """Integers in the order of the floats; -0.0 is equal to 0.0."""
    bits = jax.lax.bitcast_convert_type(values, f"int{8 * values.dtype.itemsize}")
    return jnp.where(bits < 0, jnp.iinfo(bits.dtype).min - bits, bits)


def bisect(ordered: Array, few_enough: Callable[[Array], Array]) -> Array:
    """The smallest integer [B] for which the set of larger values in `ordered`, int [B, V], is `few_enough`."""

    def halve(ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)
        enough = few_enough(ordered > middle[:, None])
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = ordered.min(axis=-1), ordered.max(axis=-1)
    _, threshold = jax.lax.while_loop(lambda ends: (ends[0] < ends[1]).any(), halve, start)
    return threshold


def search_digits(ordered: Array, few_enough: Callable[[Array], Array], width: int = 4) -> Array:
    """An integer [B] with the same larger values as that of bisect(), in a fixed number of steps of `width` bits each.

    On a GPU the host would wait for the condition of each step of bisect(), and a step takes as long as its launches.
    """
    n_bits, dtype = 8 * ordered.dtype.itemsize, ordered.dtype

    def add_digit(number, threshold):
        shift = (n_bits - width * (number + 1)).astype(dtype)
        # The last integer below each digit; the threshold is above those that leave too many values.
        last = threshold[None] + ((jnp.arange(1, 2**width, dtype=dtype) << shift) - 1)[:, None]  # [digits, B]
        enough = jax.vmap(lambda last: few_enough(ordered > last[:, None]))(last)  # [digits, B]
        return threshold + ((~enough).sum(axis=0, dtype=dtype) << shift)

    start = jnp.full(len(ordered), jnp.iinfo(dtype).min)
    return jax.lax.fori_loop(0, n_bits // width, add_digit, start, unroll=True)


def as_column(values: Array, logits: Array) -> Array:
    """[B] -> [B, 1], in the dtype of the logits."""
    return values.astype(logits.dtype)[:, None]
