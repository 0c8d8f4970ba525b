"""Reading and replacing named activations. Their names are listed in parity/taps."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax.nnx.tracers import TraceState
from jax import Array

from gpt_jax.model import GPTModel
from gpt_jax.weights import config_of
from parity import taps
from parity.arrays import as_numpy

taps.register_tracer(jax.core.Tracer, TraceState)


def run_with_cache(
    model: GPTModel,
    tokens: Array,
    names: Iterable[str] | str | None = None,
    patches: Mapping[str, taps.Patch] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Run a model, record activations and, with `patches`, replace some.

    Works inside `jax.jit`, `jax.grad` and other transformations; a model that was compiled before is refused.

    Args:
        model: A `GPTModel`. Dropout is not applied.
        tokens: Integer ids [B, T].
        names: Activations to record; `*` matches any text, as in "blocks.*.attn.pattern". All by default. Scores and
            patterns exist in the explicit attention only, which then runs in place of a fused one, with a warning.
        patches: For each name or pattern a function of the activation, or an array that broadcasts to its shape.

    Returns:
        (logits, cache): logits [B, T, V], float32 (float64 if the parameters are), and {name: activation}. A replaced
        activation is recorded as its replacement. `parity.taps.AXES` has the axes of each activation; its dtype is
        that of the parameters, and float32 at least for scores and logits.

    Raises:
        InputError: For names that the model does not have, for two patches of one activation, for a patch of the
            wrong shape, and if the model runs in a compiled or transformed function of its own.
    """
    config_of(model)  # raises for another class
    return taps.run(model, tokens, names, patches, _broadcast)


def run_with_patches(model: GPTModel, tokens: Array, patches: Mapping[str, taps.Patch]) -> Array:
    """Run a model with some activations replaced.

    Args:
        model: A `GPTModel`.
        tokens: Integer ids [B, T].
        patches: For each name or pattern a function of the activation, or an array that broadcasts to its shape.

    Returns:
        Logits [B, T, V], float32 (float64 if the parameters are).

    Raises:
        InputError: For names that the model does not have, for two patches of one activation, and for a patch of
            the wrong shape.
    """
    return run_with_cache(model, tokens, (), patches)[0]


def _broadcast(value: taps.Patch, x: Array) -> Array:
    array = value if isinstance(value, Array) else as_numpy(value)
    return jnp.broadcast_to(jnp.asarray(array, x.dtype), x.shape)
